"""Names and layouts of DeepSeek-V4 tensors: one table that maps v4jax flat names to Hugging Face names.

A rule pairs a flat name and its axis letters with the released name and its axes (spec 9.1) and, if it differs, with
the module name of transformers (spec 12.3). The letters are those of `core/axes.py`; 1 and 3 are axes of that size. The
axes of a released tensor are separated by spaces: "JL Q" means that the axes J and L are merged, followed by Q. A
letter in braces inside a name pins that axis: the checkpoint has one tensor per value of the axis. The axes therefore
determine every shape and the conversion in both directions, which is a transpose and a reshape and keeps every bit.
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

# The role of a tensor decides its dtype (lazy_tensors.py): "f32" tensors are always float32, "norm" scales are never
# narrowed, "index" tensors are integers, and every other tensor is a "matrix".


@dataclass(frozen=True)
class ParamRule:
    """One row of the table.

    Attributes:
        flat: flat name, without the prefix of the layer.
        axes: axis letters of the flat tensor.
        released: released name (spec 9.1), without the prefix of the layer.
        released_axes: axes of the released tensor.
        others: further (name, axes) that the reader accepts.
        role: decides the dtype (lazy_tensors.py).
        layers: names of attention, mlp or residual (`LayerSpec`). A layer has this tensor if it has one of these parts;
            () stands for every layer.
    """

    flat: str
    axes: str
    released: str
    released_axes: str
    others: tuple[tuple[str, str], ...] = ()
    role: str = "matrix"
    layers: tuple[str, ...] = ()


def _same(*names: str, axes: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, axes) for name in names)


# Besides the module names, three further spellings occur in files of transformers' save_pretrained, because its reverse
# renaming keeps embed_tokens.weight and hc_head.hc_* unchanged and writes attn.norm for attn.kv_norm.
_ROOT = (
    ParamRule("embed.table", "VD", "embed.weight", "V D", _same("embed_tokens.weight", axes="V D")),
    ParamRule("head.weight", "DV", "head.weight", "V D", _same("lm_head.weight", axes="V D")),
    ParamRule("norm.scale", "D", "norm.weight", "D", role="norm"),
)
_HEAD_MHC = (
    ParamRule("head_mhc.fn", "YXD", "hc_head_fn", "Y XD", _same("hc_head.hc_fn", axes="Y XD"), role="f32"),
    ParamRule("head_mhc.base", "Y", "hc_head_base", "Y", _same("hc_head.hc_base", axes="Y"), role="f32"),
    ParamRule("head_mhc.scale", "1", "hc_head_scale", "1", _same("hc_head.hc_scale", axes="1"), role="f32"),
)
_LAYER = (
    ParamRule("attn_norm.scale", "D", "attn_norm.weight", "D", _same("input_layernorm.weight", axes="D"), role="norm"),
    ParamRule(
        "ffn_norm.scale", "D", "ffn_norm.weight", "D", _same("post_attention_layernorm.weight", axes="D"), role="norm"
    ),
    ParamRule("attn_mhc.fn", "MXD", "hc_attn_fn", "M XD", _same("attn_hc.fn", axes="M XD"), role="f32"),
    ParamRule("attn_mhc.base", "M", "hc_attn_base", "M", _same("attn_hc.base", axes="M"), role="f32"),
    ParamRule("attn_mhc.scale", "3", "hc_attn_scale", "3", _same("attn_hc.scale", axes="3"), role="f32"),
    ParamRule("ffn_mhc.fn", "MXD", "hc_ffn_fn", "M XD", _same("ffn_hc.fn", axes="M XD"), role="f32"),
    ParamRule("ffn_mhc.base", "M", "hc_ffn_base", "M", _same("ffn_hc.base", axes="M"), role="f32"),
    ParamRule("ffn_mhc.scale", "3", "hc_ffn_scale", "3", _same("ffn_hc.scale", axes="3"), role="f32"),
    # attention
    ParamRule("attn.q_down", "DQ", "attn.wq_a.weight", "Q D", _same("self_attn.q_a_proj.weight", axes="Q D")),
    ParamRule(
        "attn.q_norm.scale", "Q", "attn.q_norm.weight", "Q", _same("self_attn.q_a_norm.weight", axes="Q"), role="norm"
    ),
    ParamRule("attn.q_up", "QNH", "attn.wq_b.weight", "NH Q", _same("self_attn.q_b_proj.weight", axes="NH Q")),
    ParamRule("attn.kv", "DH", "attn.wkv.weight", "H D", _same("self_attn.kv_proj.weight", axes="H D")),
    ParamRule(
        "attn.kv_norm.scale",
        "H",
        "attn.kv_norm.weight",
        "H",
        _same("self_attn.kv_norm.weight", "attn.norm.weight", axes="H"),
        role="norm",
    ),
    ParamRule("attn.sink", "N", "attn.attn_sink", "N", _same("self_attn.sinks", axes="N"), role="f32"),
    ParamRule("attn.o_down", "GIR", "attn.wo_a.weight", "GR I", _same("self_attn.o_a_proj.weight", axes="GR I")),
    ParamRule("attn.o_up", "GRD", "attn.wo_b.weight", "D GR", _same("self_attn.o_b_proj.weight", axes="D GR")),
    # compressor
    ParamRule(
        "attn.compressor.kv",
        "DW",
        "attn.compressor.wkv.weight",
        "W D",
        _same("self_attn.compressor.kv_proj.weight", axes="W D"),
        layers=("csa", "hca"),
    ),
    ParamRule(
        "attn.compressor.gate",
        "DW",
        "attn.compressor.wgate.weight",
        "W D",
        _same("self_attn.compressor.gate_proj.weight", axes="W D"),
        layers=("csa", "hca"),
    ),
    ParamRule(
        "attn.compressor.ape",
        "PW",
        "attn.compressor.ape",
        "P W",
        _same("self_attn.compressor.position_bias", axes="P W"),
        role="f32",
        layers=("csa", "hca"),
    ),
    ParamRule(
        "attn.compressor.norm.scale",
        "H",
        "attn.compressor.norm.weight",
        "H",
        _same("self_attn.compressor.kv_norm.weight", axes="H"),
        role="norm",
        layers=("csa", "hca"),
    ),
    # indexer
    ParamRule(
        "attn.indexer.q_up",
        "QJL",
        "attn.indexer.wq_b.weight",
        "JL Q",
        _same("self_attn.compressor.indexer.q_b_proj.weight", axes="JL Q"),
        layers=("csa",),
    ),
    ParamRule(
        "attn.indexer.weight",
        "DJ",
        "attn.indexer.weights_proj.weight",
        "J D",
        _same("self_attn.compressor.indexer.scorer.weights_proj.weight", axes="J D"),
        layers=("csa",),
    ),
    ParamRule(
        "attn.indexer.compressor.kv",
        "DW",
        "attn.indexer.compressor.wkv.weight",
        "W D",
        _same("self_attn.compressor.indexer.kv_proj.weight", axes="W D"),
        layers=("csa",),
    ),
    ParamRule(
        "attn.indexer.compressor.gate",
        "DW",
        "attn.indexer.compressor.wgate.weight",
        "W D",
        _same("self_attn.compressor.indexer.gate_proj.weight", axes="W D"),
        layers=("csa",),
    ),
    ParamRule(
        "attn.indexer.compressor.ape",
        "PW",
        "attn.indexer.compressor.ape",
        "P W",
        _same("self_attn.compressor.indexer.position_bias", axes="P W"),
        role="f32",
        layers=("csa",),
    ),
    ParamRule(
        "attn.indexer.compressor.norm.scale",
        "L",
        "attn.indexer.compressor.norm.weight",
        "L",
        _same("self_attn.compressor.indexer.kv_norm.weight", axes="L"),
        role="norm",
        layers=("csa",),
    ),
    # experts
    ParamRule("ffn.router.weight", "DE", "ffn.gate.weight", "E D", _same("mlp.gate.weight", axes="E D")),
    ParamRule(
        "ffn.router.bias",
        "E",
        "ffn.gate.bias",
        "E",
        _same("mlp.gate.e_score_correction_bias", axes="E"),
        role="f32",
        layers=("moe",),
    ),
    ParamRule(
        "ffn.router.table",
        "VK",
        "ffn.gate.tid2eid",
        "V K",
        _same("mlp.gate.tid2eid", axes="V K"),
        role="index",
        layers=("hash_moe",),
    ),
    ParamRule(
        "ffn.experts.gate_up",
        "EUDF",
        "ffn.experts.{E}.w{U:1,3}.weight",
        "F D",
        (("mlp.experts.gate_up_proj", "E UF D"),),
    ),
    ParamRule("ffn.experts.down", "EFD", "ffn.experts.{E}.w2.weight", "D F", (("mlp.experts.down_proj", "E D F"),)),
    ParamRule(
        "ffn.shared.gate_up",
        "DUF",
        "ffn.shared_experts.w{U:1,3}.weight",
        "F D",
        (("mlp.shared_experts.{U:gate,up}_proj.weight", "F D"),),
    ),
    ParamRule(
        "ffn.shared.down",
        "FD",
        "ffn.shared_experts.w2.weight",
        "D F",
        _same("mlp.shared_experts.down_proj.weight", axes="D F"),
    ),
)
_MTP = (
    ParamRule("embed_norm.scale", "D", "enorm.weight", "D", role="norm"),
    ParamRule("hidden_norm.scale", "D", "hnorm.weight", "D", role="norm"),
    ParamRule("embed_proj", "DO", "e_proj.weight", "O D"),
    ParamRule("hidden_proj", "DO", "h_proj.weight", "O D"),
    ParamRule("norm.scale", "D", "norm.weight", "D", role="norm"),
)

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
    result = [_bind(rule, "", ("", "model."), _sizes(model)) for rule in _ROOT + _HEAD_MHC]
    for i, layer in enumerate(model.layers):
        result += _layer(model, layer, f"layers.{i}.", f"layers.{i}.")
    for i, layer in enumerate(model.mtp_layers):
        prefixes = (f"mtp.{i}.", f"model.mtp.{i}.")
        result += [_bind(rule, f"mtp.{i}.", prefixes, _sizes(model)) for rule in _MTP + _HEAD_MHC]
        result += _layer(model, layer, f"mtp.{i}.block.", f"mtp.{i}.")
    return {tensor.name: tensor for tensor in result}


def shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Return {flat name: shape} for every tensor of a model."""
    return {name: tensor.shape for name, tensor in tensors(model).items()}


def _layer(model: Model, layer: LayerSpec, flat_prefix: str, hf_prefix: str) -> list[ParamInfo]:
    prefixes = (hf_prefix, f"model.{hf_prefix}")
    sizes = _sizes(model) | _attention_sizes(model, layer.attention)
    # The shared experts are stored as one expert of their total width. The indexer has a compressor of its own width.
    special = {
        "ffn.shared.": {"F": model.moe.moe_intermediate_size * model.moe.n_shared_experts},
        "attn.indexer.": {"W": 2 * model.indexer.index_head_dim},
    }
    result = []
    for rule in _LAYER:
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
