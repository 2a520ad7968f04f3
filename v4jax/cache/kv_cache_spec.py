"""Storage formats and sizes in bytes of the KV cache, computed from the config without allocating anything.

A block holds the entries of `block_size` tokens in every layer: main entries, and in CSA layers an index key for each.
A state slot holds the window rings and the compressor state of one sequence. Values of `kv_cache_dtype` (spec 2.10):

    auto     both in the model's own float type
    bf16     both in bfloat16
    fp8      entries in e4m3 with a scale per 64, rotary channels in bfloat16; keys in e4m3 with a scale per 32
    fp8_fp4  entries as in fp8; keys in e2m1 with a scale per 32

State slots are not quantized in any format, because they are few and each step reads and writes them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from v4jax import config
from v4jax.cache.paged_cache import new_paged_layer_cache
from v4jax.core.config_limits import CHOICES
from v4jax.core.errors import UserError
from v4jax.core.qtensor import group_size
from v4jax.nn import qdq

KV_CACHE_DTYPES = CHOICES["cache.kv_cache_dtype"]
_FORMATS = {"fp8": {"main": "fp8", "index": "fp8"}, "fp8_fp4": {"main": "fp8", "index": "fp4"}}
_GROUP = {"main": qdq.ENTRY_GROUP, "index": qdq.KEY_GROUP}
_WORD = 4  # bytes that a quantized row is padded to a multiple of
_INDEX_BYTES = 4  # of an index in `DeviceEntryCache`
_COUNTER_BYTES = 20  # of the counters of a `DeviceEntryCache`


@dataclass(frozen=True)
class EntryFormat:
    """Storage format of one main entry or one index key.

    Attributes:
      width: numbers per row.
      format: "fp8" or "fp4" if quantized, else the dtype of the row.
      group: numbers that share a scale; 0 if the row is not quantized.
      rotary: rotary channels at the end of a quantized row, which stay bfloat16; 0 if the row is not quantized.
    """

    width: int
    format: str
    group: int = 0
    rotary: int = 0

    @property
    def planes(self) -> dict[str, tuple[int, str]]:
        """Arrays of a pool in this format, by name: (numbers per row, dtype). bfloat16 is stored as its bits, uint16.

        The scales are padded so that the planes of a row add up to a multiple of 4 bytes. For the released models this
        gives the sizes of spec 2.10: 448 + 2 * 64 + 7 scales + 1 = 584 bytes, and 128 + 4 and 64 + 4 bytes for keys.
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
        """Bytes per row, summed over its planes."""
        return sum(count * jnp.dtype(dtype).itemsize for count, dtype in self.planes.values())

    @property
    def words(self) -> int:
        """32-bit words per row in host memory, where each plane is padded to whole words (see `host_pool`)."""
        return sum(-(-count * jnp.dtype(dtype).itemsize // _WORD) for count, dtype in self.planes.values())


def entry_format(model: config.Model, kind: str, kv_cache_dtype: str) -> EntryFormat:
    """Return the storage format of a main entry or an index key, with the fewest equal groups that the format allows.

    Args:
      model: the model's config.
      kind: "main" or "index".
      kv_cache_dtype: one of `KV_CACHE_DTYPES`.

    Raises:
      UserError: the dtype is unknown or cannot hold the model's shapes.
    """
    if kv_cache_dtype not in KV_CACHE_DTYPES:
        raise UserError(f"unknown kv_cache_dtype {kv_cache_dtype!r}; one of {', '.join(KV_CACHE_DTYPES)}")
    width, rotary = {"main": (model.head_dim, model.qk_rope_head_dim), "index": (model.indexer.index_head_dim, 0)}[kind]
    if kv_cache_dtype not in _FORMATS:
        return EntryFormat(width, model.dtype if kv_cache_dtype == "auto" else "bfloat16")
    format = _FORMATS[kv_cache_dtype][kind]
    if width == rotary:
        raise UserError(
            f"kv_cache_dtype {kv_cache_dtype} quantizes what is not rotary, and model.qk_rope_head_dim is all {width}; "
            "take bf16"
        )
    if format == "fp4" and width % 2:
        raise UserError(
            f"kv_cache_dtype {kv_cache_dtype} packs pairs, and model.indexer.index_head_dim {width} is odd; take fp8"
        )
    return EntryFormat(width, format, group_size(width - rotary, _GROUP[kind]), rotary)


def default_block_size(model: config.Model, wanted: int = 256) -> int:
    """Return tokens per block: the least multiple of all compression ratios in use that is at least `wanted`."""
    step = math.lcm(*(model.compress_rate(kind) for kind in _compressed(model)))
    return max(1, -(-wanted // step)) * step


def validate_block_size(model: config.Model, block: int) -> int:
    """Return `block` (tokens). Raises UserError if it is below 1 or not a multiple of every compression ratio."""
    for kind in sorted(set(_compressed(model))):
        ratio = model.compress_rate(kind)
        if block < 1 or block % ratio:
            raise UserError(
                f"cache.block_size of {block} tokens is not a multiple of model.compress_rate_{kind} {ratio}; "
                f"take {default_block_size(model, block)}"
            )
    if block < 1:
        raise UserError(f"cache.block_size of {block} tokens; take at least 1")
    return block


@dataclass(frozen=True)
class KVCacheSpec:
    """Sizes of a model's KV cache.

    Attributes:
      model: the model's config.
      kv_cache_dtype: one of `KV_CACHE_DTYPES`.
      block_size: tokens per block; 0 is replaced by `default_block_size(model)`.
      num_device_entries: entries per CSA layer that are cached on the device. If it is not 0, the main entries of CSA
        layers and the compressor state of HCA layers are in host memory. 0 keeps everything on the device.

    Raises:
      UserError: the dtype is unknown, the format cannot hold the model's shapes, or a compression ratio does not divide
        the block.
    """

    model: config.Model
    kv_cache_dtype: str = "auto"
    block_size: int = 0
    num_device_entries: int = 0

    def __post_init__(self):
        size = self.block_size
        size = validate_block_size(self.model, size) if size else default_block_size(self.model)
        object.__setattr__(self, "block_size", size)
        for kind in ("main", "index") if "csa" in self.model.layer_types else ("main",):
            entry_format(self.model, kind, self.kv_cache_dtype)

    @property
    def entry_bytes(self) -> int:
        """Bytes per main entry."""
        return entry_format(self.model, "main", self.kv_cache_dtype).nbytes

    @property
    def key_bytes(self) -> int:
        """Bytes per index key."""
        return entry_format(self.model, "index", self.kv_cache_dtype).nbytes

    def entries(self, kind: str) -> int:
        """Return entries per block in a layer of type `kind` ("csa" or "hca")."""
        return self.block_size // self.model.compress_rate(kind)

    @property
    def block_bytes(self) -> int:
        """Bytes on the device per block, over all layers."""
        main = lambda: _INDEX_BYTES if self.num_device_entries else self.entry_bytes
        size = {"csa": lambda: main() + self.key_bytes, "hca": lambda: self.entry_bytes}
        return sum(self.entries(kind) * size[kind]() for kind in _compressed(self.model))

    @property
    def host_block_bytes(self) -> int:
        """Bytes in host memory per block, over all layers; 0 if everything is on the device."""
        layers = self.model.layer_types.count("csa") if self.num_device_entries else 0
        row_bytes = _WORD * entry_format(self.model, "main", self.kv_cache_dtype).words
        return layers and layers * self.entries("csa") * row_bytes

    @property
    def device_cache_bytes(self) -> int:
        """Bytes of the device caches of host-resident entries, over all layers, beside those that count per block."""
        layers = self.model.layer_types.count("csa") if self.num_device_entries else 0
        rows_bytes = (1 + self.num_device_entries) * (self.entry_bytes + 2 * _INDEX_BYTES)
        return layers and layers * (rows_bytes + _COUNTER_BYTES)

    @property
    def token_bytes(self) -> float:
        """Bytes on the device per token of context, over all layers: block_bytes / block_size."""
        return self.block_bytes / self.block_size

    def state_bytes(self, slack: int = 0, mtp: bool = False) -> int:
        """Return bytes on the device per state slot, over all layers. Host-resident compressor state does not count.

        Args:
          slack: extra rows of each ring, the number of tokens that speculative decoding may go back.
          mtp: include the MTP layer.
        """

        def layer_bytes(kind: str) -> int:
            past = self._record(kind, slack)
            return _bytes(past.window_ring_ZSH if self.num_device_entries and kind == "hca" else past)

        layers = self.model.layers + (self.model.mtp_layers if mtp else ())
        kinds = [layer.attention for layer in layers]
        sizes = {kind: layer_bytes(kind) for kind in set(kinds)}
        return sum(sizes[kind] for kind in kinds)

    def host_state_bytes(self, slack: int = 0) -> int:
        """Return bytes in host memory per state slot, over all layers; 0 if everything is on the device."""
        layers = self.model.layer_types.count("hca") if self.num_device_entries else 0
        return layers and layers * _bytes(self._record("hca", slack).compressor_state)

    def _record(self, kind: str, slack: int):
        dtype = jnp.dtype(self.model.dtype)
        return jax.eval_shape(lambda: new_paged_layer_cache(self.model, kind, 1, lambda part: None, dtype, slack))

    def blocks_for(self, budget: int) -> int:
        """Return the number of blocks that fit in `budget` bytes, including the reserved block 0.

        Raises:
          UserError: fewer than 2 blocks fit, or the model has window layers only and needs no blocks.
        """
        if not self.block_bytes:
            raise UserError("a model of window layers alone has no pages, so a byte budget gives no number of pages")
        if budget < 2 * self.block_bytes:
            raise UserError(
                f"a cache of {budget:,} bytes holds no page beside the spare one: a page of {self.block_size} tokens "
                f"takes {self.block_bytes:,} bytes in kv_cache_dtype {self.kv_cache_dtype}; give at least "
                f"{2 * self.block_bytes:,}"
            )
        return budget // self.block_bytes


def _bytes(tree) -> int:
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def _compressed(model: config.Model) -> list[str]:
    """Return the type of each layer that has entries, in layer order."""
    return [kind for kind in model.layer_types if model.compress_rate(kind)]
