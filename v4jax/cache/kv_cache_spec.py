"""What each layer keeps, and its size in bytes: from the config alone, nothing is allocated.

A *page* holds the compressed entries of one block of tokens in one layer: main entries, and in CSA layers an indexer
key beside each. A *record* is what else resumes a sequence at the end of a block: the window rows and the compressors'
tails. Layouts of entries and keys (spec 2.10):

    model    both in the model's own float type
    bf16     both in bfloat16
    fp8      entries: e4m3 with a scale per 64, the rotary end in bfloat16; keys: e4m3 with a scale per 32
    fp8_fp4  entries as in fp8; keys: e2m1 with a scale per 32

Records keep the model's float type in every layout: they are few, and each step reads and writes them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from v4jax import config
from v4jax.cache.paged_cache import new_paged_layer_cache
from v4jax.core.errors import UserError
from v4jax.core.qtensor import group_size
from v4jax.nn import qdq

KV_CACHE_DTYPES = ("auto", "bf16", "fp8", "fp8_fp4")
_FORMATS = {"fp8": {"main": "fp8", "index": "fp8"}, "fp8_fp4": {"main": "fp8", "index": "fp4"}}
_GROUP = {"main": qdq.ENTRY_GROUP, "index": qdq.KEY_GROUP}
_WORD = 4  # bytes that a quantized row is padded to a multiple of
_PLACE, _COUNTS = 4, 20  # bytes of the number of a row in `nn.hot.DeviceEntryCache`, and of its counters


@dataclass(frozen=True)
class EntryFormat:
    """How one main entry or one indexer key is stored: `width` numbers, of which the last `rotary` stay bfloat16.

    format: "fp8" or "fp4" in groups of `group`; or the dtype of a plain row, where group and rotary are 0.
    """

    width: int
    format: str
    group: int = 0
    rotary: int = 0

    @property
    def planes(self) -> dict[str, tuple[int, str]]:
        """Arrays of a pool of such rows: name to (numbers a row, dtype); bfloat16 is held as its bits, uint16.

        The scales' plane is padded so that the planes of a row add up to whole words of 4 bytes. For the published
        shape that gives the published record: 448 + 2 * 64 + 7 scales + 1 = 584 bytes, and 128 + 4 and 64 + 4 for keys.
        """
        if not self.group:
            return {"rows": (self.width, "uint16" if self.format == "bfloat16" else self.format)}
        quantized = self.width - self.rotary
        values, scales = quantized // (2 if self.format == "fp4" else 1), quantized // self.group
        scales += -(values + 2 * self.rotary + scales) % _WORD
        rotary = {"rotary": (self.rotary, "uint16")} if self.rotary else {}
        return {"values": (values, "uint8"), **rotary, "scales": (scales, "uint8")}

    @property
    def nbytes(self) -> int:
        """Bytes of one row over its planes."""
        return sum(count * jnp.dtype(dtype).itemsize for count, dtype in self.planes.values())

    @property
    def words(self) -> int:
        """Words of a row in host memory, where each plane is padded to whole ones (`cache.far`)."""
        return sum(-(-count * jnp.dtype(dtype).itemsize // _WORD) for count, dtype in self.planes.values())


def entry_format(model: config.Model, kind: str, layout: str) -> EntryFormat:
    """The row of a main entry (kind "main") or of an indexer key ("index"). Groups are equal, the fewest that fit.

    Raises UserError for an unknown layout, and for shapes that it cannot hold.
    """
    if layout not in KV_CACHE_DTYPES:
        raise UserError(f"unknown kv_cache_dtype {layout!r}; one of {', '.join(KV_CACHE_DTYPES)}")
    width, rotary = {"main": (model.head_dim, model.qk_rope_head_dim), "index": (model.indexer.index_head_dim, 0)}[kind]
    if layout not in _FORMATS:
        return EntryFormat(width, model.dtype if layout == "auto" else "bfloat16")
    format = _FORMATS[layout][kind]
    if width == rotary:
        raise UserError(
            f"kv_cache_dtype {layout} quantizes what is not rotary, and model.qk_rope_head_dim is all {width}; "
            "take bf16"
        )
    if format == "fp4" and width % 2:
        raise UserError(
            f"kv_cache_dtype {layout} packs pairs, and model.indexer.index_head_dim {width} is odd; take fp8"
        )
    return EntryFormat(width, format, group_size(width - rotary, _GROUP[kind]), rotary)


def block_size(model: config.Model, wanted: int = 256) -> int:
    """Tokens of a block: the least multiple of all compression ratios in use that is at least `wanted`."""
    step = math.lcm(*(model.compress_rate(kind) for kind in _compressed(model)))
    return max(1, -(-wanted // step)) * step


def validate_block_size(model: config.Model, block: int) -> int:
    """A block size that a user gave, if every ratio divides it. Raises UserError naming the first that does not."""
    for kind in sorted(set(_compressed(model))):
        ratio = model.compress_rate(kind)
        if block < 1 or block % ratio:
            raise UserError(
                f"cache.block_size of {block} tokens is not a multiple of model.compress_rate_{kind} {ratio}; "
                f"take {block_size(model, block)}"
            )
    if block < 1:
        raise UserError(f"cache.block_size of {block} tokens; take at least 1")
    return block


@dataclass(frozen=True)
class KVCacheSpec:
    """Sizes of a model's cache. name: one of LAYOUTS; block: tokens of a page, 0 for `block_tokens(model)`; hot: rows
    that the device keeps of a CSA layer's main entries, which then lie in host memory as the tails of HCA layers do, 0
    if all of it lies on the device.

    Raises UserError for an unknown name, shapes that the layout cannot hold, or a block that a ratio does not divide.
    """

    model: config.Model
    name: str = "auto"
    block: int = 0
    hot: int = 0

    def __post_init__(self):
        block = validate_block_size(self.model, self.block) if self.block else block_size(self.model)
        object.__setattr__(self, "block", block)
        for kind in ("main", "index") if "csa" in self.model.layer_types else ("main",):
            entry_format(self.model, kind, self.name)

    @property
    def entry_bytes(self) -> int:
        """Bytes of one main entry."""
        return entry_format(self.model, "main", self.name).nbytes

    @property
    def key_bytes(self) -> int:
        """Bytes of one indexer key."""
        return entry_format(self.model, "index", self.name).nbytes

    def entries(self, kind: str) -> int:
        """Entries that a page of a layer of this kind (csa, hca) holds."""
        return self.block // self.model.compress_rate(kind)

    @property
    def block_bytes(self) -> int:
        """Bytes on the device of one page over all layers."""
        main = lambda: _PLACE if self.hot else self.entry_bytes
        size = {"csa": lambda: main() + self.key_bytes, "hca": lambda: self.entry_bytes}
        return sum(self.entries(kind) * size[kind]() for kind in _compressed(self.model))

    @property
    def host_block_bytes(self) -> int:
        """Bytes in host memory of one page over all layers: 0 where all of it lies on the device."""
        layers = self.model.layer_types.count("csa") if self.hot else 0
        return layers and layers * self.entries("csa") * _WORD * entry_format(self.model, "main", self.name).words

    @property
    def device_cache_bytes(self) -> int:
        """Bytes on the device of what is kept there of entries in host memory, beside the pages, over all layers."""
        layers = self.model.layer_types.count("csa") if self.hot else 0
        return layers and layers * ((1 + self.hot) * (self.entry_bytes + 2 * _PLACE) + _COUNTS)

    @property
    def token_bytes(self) -> float:
        """Bytes that one more token of context takes, over all layers: a page's share."""
        return self.block_bytes / self.block

    def state_bytes(self, slack: int = 0, mtp: bool = False) -> int:
        """Bytes on the device of one record over the layers; mtp: with the MTP layer's. The tails of HCA layers are not
        there where CSA entries are not."""

        def kept(kind: str) -> int:
            past = self._record(kind, slack)
            return _bytes(past.window_ring_ZSH if self.hot and kind == "hca" else past)

        kinds = [*self.model.layer_types, *(["swa"] if mtp else [])]
        sizes = {kind: kept(kind) for kind in set(kinds)}
        return sum(sizes[kind] for kind in kinds)

    def host_state_bytes(self, slack: int = 0) -> int:
        """Bytes in host memory of one record over the layers: 0 where all of it lies on the device."""
        layers = self.model.layer_types.count("hca") if self.hot else 0
        return layers and layers * _bytes(self._record("hca", slack).compressor_state)

    def _record(self, kind: str, slack: int):
        dtype = jnp.dtype(self.model.dtype)
        return jax.eval_shape(lambda: new_paged_layer_cache(self.model, kind, 1, lambda part: None, dtype, slack))

    def blocks_for(self, budget: int) -> int:
        """Pages that `budget` bytes hold, page 0 (which is never given out) among them.

        Raises UserError if that leaves none to give out, or if the model has window layers only and needs none.
        """
        if not self.block_bytes:
            raise UserError("a model of window layers alone keeps no pages, so no byte budget says how many")
        if budget < 2 * self.block_bytes:
            raise UserError(
                f"a cache of {budget:,} bytes holds no page beside the spare one: a page of {self.block} tokens takes "
                f"{self.block_bytes:,} bytes in kv_cache_dtype {self.name}; give at least {2 * self.block_bytes:,}"
            )
        return budget // self.block_bytes


def _bytes(tree) -> int:
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def _compressed(model: config.Model) -> list[str]:
    """Kinds of the layers that keep entries, layer by layer."""
    return [kind for kind in model.layer_types if model.compress_rate(kind)]
