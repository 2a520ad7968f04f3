"""Device pools of one layer's main entries or index keys, in every storage format (see `entry_pool.EntryPool`).

The planes of a pool are separate arrays [blocks, entries per block, ...], not interleaved, so a read of one plane is
contiguous. Planes of 16 bits or less are unsigned integers, so that an in-place write costs only the bytes that it
writes. XLA:CPU would update a bfloat16 array through a float32 copy of the whole array.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from v4jax import config
from v4jax.cache import kv_cache_spec
from v4jax.cache.entry_pool import EntryPool, FloatPool
from v4jax.core.pytree import pytree
from v4jax.core.qtensor import QTensor, quantize
from v4jax.kernels.attention import PagedOperands, decode_rows


@pytree
class Bf16Pool(EntryPool):
    """A pool of bfloat16 rows, stored as their bits: uint16 [blocks, slots, width]."""

    bits: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """(blocks, rows per block, row width)."""
        return self.bits.shape

    def encode(self, rows: jax.Array) -> Bf16Pool:
        return Bf16Pool(jax.lax.bitcast_convert_type(rows.astype(jnp.bfloat16), jnp.uint16))

    def decode(self, compute: jnp.dtype) -> jax.Array:
        return decode_rows(self.bits, None, None, 0, "bfloat16", compute)

    def operands(self, block_table_BA: jax.Array, compute: jnp.dtype) -> PagedOperands:
        return PagedOperands(self.bits, None, None, block_table_BA, 0, "bfloat16", jnp.dtype(compute))


@pytree
class QuantizedPool(EntryPool):
    """A pool of rows in 8 or 4 bits. A read dequantizes only the rows that it returns.

    Attributes:
      values: uint8 [blocks, slots, n], e4m3 codes or pairs of e2m1 codes.
      scales: uint8 [blocks, slots, n], one scale per group, then padding.
      rotary: pool of the rotary channels at the end of each row; None if there are none.
      row: storage format of a row.
    """

    values: jax.Array
    scales: jax.Array
    rotary: Bf16Pool | None
    row: kv_cache_spec.EntryFormat = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """(blocks, rows per block, row width)."""
        return (*self.values.shape[:2], self.row.width)

    @property
    def _groups(self) -> int:
        return (self.row.width - self.row.rotary) // self.row.group

    def encode(self, rows: jax.Array) -> QuantizedPool:
        """Quantize `rows` [..., width] with the rounding of spec 2.4; rotary channels become bfloat16."""
        split = self.row.width - self.row.rotary
        values, scales = quantize(rows[..., :split], self.row.format, self.row.group)
        spare = self.scales.shape[-1] - scales.shape[-1]
        scales = jnp.pad(scales, [(0, 0)] * (scales.ndim - 1) + [(0, spare)])
        return QuantizedPool(values, scales, self.rotary and self.rotary.encode(rows[..., split:]), self.row)

    def raw_fp8(self) -> QTensor | None:
        whole = self.row.format == "fp8" and self.rotary is None
        return QTensor(self.values, self.scales[..., : self._groups]) if whole else None

    def decode(self, compute: jnp.dtype) -> jax.Array:
        """Dequantize all rows to [..., width] in dtype `compute`, which is float32 or bfloat16."""
        rotary = self.rotary and self.rotary.bits
        return decode_rows(self.values, self.scales, rotary, self.row.group, self.row.format, compute)

    def operands(self, block_table_BA: jax.Array, compute: jnp.dtype) -> PagedOperands:
        planes = self.values, self.scales, self.rotary and self.rotary.bits
        return PagedOperands(*planes, block_table_BA, self.row.group, self.row.format, jnp.dtype(compute))


def new_pool(model: config.Model, kind: str, pages: int, entries_per_page: int, kv_cache_dtype: str) -> EntryPool:
    """Allocate an empty pool of one layer. Its rows read as zeros.

    Args:
      model: the model's config.
      kind: "main" for main entries, "index" for index keys.
      pages: number of blocks.
      entries_per_page: entries per block.
      kv_cache_dtype: one of `kv_cache_spec.KV_CACHE_DTYPES`.

    Raises:
      UserError: the dtype is unknown or cannot hold the model's shapes (see `kv_cache_spec.entry_format`).
    """
    return zeros(kv_cache_spec.entry_format(model, kind, kv_cache_dtype), pages, entries_per_page)


def zeros(row: kv_cache_spec.EntryFormat, pages: int, slots: int) -> EntryPool:
    """Allocate an empty pool of `pages` blocks with `slots` rows each, in storage format `row`."""
    planes = {name: jnp.zeros((pages, slots, count), dtype) for name, (count, dtype) in row.planes.items()}
    if row.group:
        rotary = Bf16Pool(planes["rotary"]) if row.rotary else None
        return QuantizedPool(planes["values"], planes["scales"], rotary, row)
    return Bf16Pool(planes["rows"]) if row.format == "bfloat16" else FloatPool(planes["rows"])
