"""Names and layouts of tensors: the mapping between v4jax flat names and Hugging Face names.

The rules of each model type are tables in `v4jax/models/hf` (see `ParamRule` there). They determine every shape and the
conversion in both directions, which is a transpose and a reshape and keeps every bit.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

from v4jax.config import Model
from v4jax.core.layer_spec import LayerSpec
from v4jax.models import hf_config
from v4jax.models.hf.param_rules import ParamRule

# Tensors that the reader ignores: the MTP copies of embedding and head, which transformers' converter drops too.
IGNORED = re.compile(r"(model\.)?mtp\.\d+\.(embed|embed_tokens|emb\.tok_emb|head|shared_head\.head|lm_head)\.weight")
# Draft layers of another kind than MTP (DSpark, spec 5.2) have this tensor.
FOREIGN_DRAFT = re.compile(r"(model\.)?mtp\.\d+\.main_proj\..*")


@dataclass(frozen=True)
class TensorPiece:
    """One tensor of a checkpoint and its position in a flat tensor.

    The checkpoint tensor is `flat[index]`, transposed by `order` and reshaped to `shape`.
    """

    name: str
    shape: tuple[int, ...]
    index: tuple[int | slice, ...]
    order: tuple[int, ...]  # axes of flat[index] in the order of the checkpoint
    unmerged: tuple[int, ...]  # shape after the transpose, before axes are merged

    def to_hf(self, flat: np.ndarray) -> np.ndarray:
        """Return this piece of `flat` in the checkpoint's layout ([out, in] for matrices), contiguous, same dtype."""
        part = flat[self.index].transpose(self.order)
        out = np.empty(part.shape, flat.dtype)
        _copy(out, part)
        return out.reshape(self.shape)

    def put(self, flat: np.ndarray, tensor: np.ndarray) -> None:
        """Write `tensor`, this piece as read from a checkpoint, into its position in `flat` of the same dtype."""
        _copy(flat[self.index].transpose(self.order), tensor.reshape(self.unmerged))


@dataclass(frozen=True)
class ParamInfo:
    """One flat tensor of a model, and the spellings (names and layouts) that checkpoints use for it."""

    name: str
    shape: tuple[int, ...]
    role: str
    _axes: str
    _spellings: tuple[tuple[str, str], ...]
    _sizes: tuple[tuple[str, int], ...]

    @property
    def spellings(self) -> int:
        """Number of known spellings. Spelling 0 is the released one, which the writer uses."""
        return len(self._spellings)

    def first(self, spelling: int) -> str:
        """Return the name of the first piece, by which a reader recognizes the spelling."""
        return next(self.pieces(spelling)).name

    def pieces(self, spelling: int = 0) -> Iterator[TensorPiece]:
        """Yield the checkpoint tensors that make up this flat tensor, in order."""
        pattern, hf_axes = self._spellings[spelling]
        parts, pinned = _parse(pattern)
        free = [letter for letter in self._axes if letter not in dict(pinned)]
        letters = hf_axes.replace(" ", "")
        sizes = dict(self._sizes)
        order = tuple(free.index(letter) for letter in letters)
        unmerged = tuple(sizes[letter] for letter in letters)
        shape = tuple(math.prod(sizes[letter] for letter in word) for word in hf_axes.split())
        for values in itertools.product(*(range(sizes[letter]) for letter, _ in pinned)):
            words = [labels[value] if labels else str(value) for (_, labels), value in zip(pinned, values, strict=True)]
            name = "".join(itertools.chain(*itertools.zip_longest(parts, words, fillvalue="")))
            at = dict(zip((letter for letter, _ in pinned), values, strict=True))
            yield TensorPiece(name, shape, tuple(at.get(letter, slice(None)) for letter in self._axes), order, unmerged)


def tensors(model: Model) -> dict[str, ParamInfo]:
    """Return {flat name: tensor} for every tensor of a model, in the order in which they are written to files."""
    rules = hf_config.model_type(model).params
    result = [_bind(rule, "", ("", "model."), _sizes(model)) for rule in rules.root]
    for i, layer in enumerate(model.layers):
        result += _layer(rules.layer, model, layer, f"layers.{i}.", f"layers.{i}.")
    for i, layer in enumerate(model.mtp_layers):
        prefixes = (f"mtp.{i}.", f"model.mtp.{i}.")
        result += [_bind(rule, f"mtp.{i}.", prefixes, _sizes(model)) for rule in rules.mtp]
        result += _layer(rules.layer, model, layer, f"mtp.{i}.block.", f"mtp.{i}.")
    return {tensor.name: tensor for tensor in result}


def shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Return {flat name: shape} for every tensor of a model."""
    return {name: tensor.shape for name, tensor in tensors(model).items()}


def _layer(
    rules: tuple[ParamRule, ...], model: Model, layer: LayerSpec, flat_prefix: str, hf_prefix: str
) -> list[ParamInfo]:
    prefixes = (hf_prefix, f"model.{hf_prefix}")
    sizes = _sizes(model) | _attention_sizes(model, layer.attention)
    # The shared experts are stored as one expert of their total width. The indexer has a compressor of its own width.
    special = {
        "ffn.shared.": {"F": model.moe.moe_intermediate_size * model.moe.n_shared_experts},
        "attn.indexer.": {"W": 2 * model.indexer.index_head_dim},
    }
    result = []
    for rule in rules:
        if not rule.layers or layer.parts.intersection(rule.layers):
            own = next((sizes for start, sizes in special.items() if rule.flat.startswith(start)), {})
            result.append(_bind(rule, flat_prefix, prefixes, sizes | own))
    return result


def _bind(rule: ParamRule, flat_prefix: str, prefixes: tuple[str, ...], sizes: dict[str, int]) -> ParamInfo:
    spellings = ((rule.released, rule.released_axes), *rule.others)
    every = tuple((prefix + name, axes) for prefix in prefixes for name, axes in spellings)
    shape = tuple(sizes[letter] for letter in rule.axes)
    used = tuple((letter, sizes[letter]) for letter in rule.axes)
    return ParamInfo(flat_prefix + rule.flat, shape, rule.role, rule.axes, every, used)


def _sizes(model: Model) -> dict[str, int]:
    """Return the size of each axis that does not depend on the layer."""
    streams = model.mhc.hc_mult
    return {
        "1": 1,
        "3": 3,
        "U": 2,
        "V": model.vocab_size,
        "D": model.hidden_size,
        "O": model.hidden_size,
        "X": streams,
        "Y": streams,
        "M": streams * streams + 2 * streams,
        "Q": model.q_lora_rank,
        "N": model.num_attention_heads,
        "H": model.head_dim,
        "G": model.o_groups,
        "R": model.o_lora_rank,
        "I": model.num_attention_heads * model.head_dim // model.o_groups,
        "J": model.indexer.index_n_heads,
        "L": model.indexer.index_head_dim,
        "E": model.moe.n_routed_experts,
        "F": model.moe.moe_intermediate_size,
        "K": model.moe.num_experts_per_tok,
    }


def _attention_sizes(model: Model, kind: str) -> dict[str, int]:
    """Return the sizes of the compressor's axes in a layer of this attention kind."""
    return {"W": model.head_dim * (2 if kind == "csa" else 1), "P": model.compress_rate(kind)}


@cache
def _parse(pattern: str) -> tuple[tuple[str, ...], tuple[tuple[str, tuple[str, ...]], ...]]:
    """Parse a name pattern such as "a{E}b{U:x,y}c".

    Returns:
        The texts around the braces, and the (letter, labels) of each brace. Empty labels mean that names contain the
        index along the axis.
    """
    pieces = re.split(r"\{(\w)(?::([\w,]+))?\}", pattern)
    labels = (tuple(text.split(",")) if text else () for text in pieces[2::3])
    return tuple(pieces[0::3]), tuple(zip(pieces[1::3], labels, strict=True))


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    """Copy `source` into `target` bit by bit; both have the same dtype and shape.

    The copy uses integer views, which numpy copies faster than ml_dtypes types, and which keep NaN payloads. A
    transposing copy takes 8 rows of the source at a time, so that both sides stay in the CPU cache. For 2048 x 1024
    bfloat16 it is faster than a plain copy.
    """
    bits = np.dtype(f"u{target.dtype.itemsize}")
    target, source = target.view(bits), source.view(bits)
    if target.ndim < 2 or np.argmin(target.strides) == np.argmin(source.strides):
        target[...] = source
        return
    across, along = int(np.argmin(target.strides)), int(np.argmin(source.strides))
    outer = [1 if axis in (across, along) else size for axis, size in enumerate(target.shape)]
    for place in np.ndindex(*outer):
        index = [slice(None) if axis in (across, along) else at for axis, at in enumerate(place)]
        for row in range(0, target.shape[across], 8):
            index[across] = slice(row, row + 8)
            target[tuple(index)] = source[tuple(index)]
