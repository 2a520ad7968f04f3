"""Pools of one layer's main entries or indexer keys, in every layout (see `paged_cache.EntryPool` for what a pool is).

The planes of a pool are arrays [pages, entries of a page, ...] that lie apart, never interleaved in records: what a
reader takes of a plane is contiguous. Those of 16 bits and less are unsigned integers, so that a write in place costs
what it writes: XLA:CPU updates a bfloat16 array by way of a float32 copy of the whole of it.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from v4jax import config
from v4jax.cache import kv_cache_spec
from v4jax.cache.paged_cache import EntryPool, FloatPool
from v4jax.core.pytree import pytree
from v4jax.core.qtensor import QTensor, dequantize, quantize


@pytree
class Bf16Pool(EntryPool):
    """A pool of bfloat16 numbers, held as their bits: uint16 [pages, slots, width]."""

    bits: jax.Array

    @property
    def shape(self) -> tuple[int, int, int]:
        """Pages, rows of a page, numbers of a row."""
        return self.bits.shape

    def encode(self, rows: jax.Array) -> Bf16Pool:
        return Bf16Pool(jax.lax.bitcast_convert_type(rows.astype(jnp.bfloat16), jnp.uint16))

    def decode(self, compute: jnp.dtype) -> jax.Array:
        return jax.lax.bitcast_convert_type(self.bits, jnp.bfloat16).astype(compute)


@pytree
class QuantizedPool(EntryPool):
    """A pool of rows in 8 or 4 bits: planes of values and of scales, and a pool of the rotary ends, if any.

    Only rows that are asked for are dequantized.
    """

    values: jax.Array
    scales: jax.Array
    rotary: Bf16Pool | None
    row: kv_cache_spec.EntryFormat = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int, int]:
        """Pages, rows of a page, numbers of a row."""
        return (*self.values.shape[:2], self.row.width)

    @property
    def _groups(self) -> int:
        return (self.row.width - self.row.rotary) // self.row.group

    def encode(self, rows: jax.Array) -> QuantizedPool:
        """Rows are rounded as spec 2.4 says."""
        split = self.row.width - self.row.rotary
        values, scales = quantize(rows[..., :split], self.row.format, self.row.group)
        spare = self.scales.shape[-1] - scales.shape[-1]
        scales = jnp.pad(scales, [(0, 0)] * (scales.ndim - 1) + [(0, spare)])
        return QuantizedPool(values, scales, self.rotary and self.rotary.encode(rows[..., split:]), self.row)

    def raw_fp8(self) -> QTensor | None:
        whole = self.row.format == "fp8" and self.rotary is None
        return QTensor(self.values, self.scales[..., : self._groups]) if whole else None

    def decode(self, compute: jnp.dtype) -> jax.Array:
        """`compute` is float32 or bfloat16."""
        x = dequantize(self.values, self.scales[..., : self._groups], self.row.format, compute)
        if self.rotary is None:
            return x
        rotary = self.rotary.decode(compute)
        # Joined piece by piece: along the last axis XLA:CPU would write the values twice.
        piece = math.gcd(x.shape[-1], self.row.rotary)
        both = [a.reshape(*a.shape[:-1], -1, piece) for a in (x, rotary)]
        return jnp.concatenate(both, axis=-2).reshape(*x.shape[:-1], self.row.width)


def new_pool(model: config.Model, kind: str, pages: int, entries_per_page: int, layout: str) -> EntryPool:
    """Empty pool of one layer's main entries (kind "main") or indexer keys ("index"); rows read as zeros.

    layout: one of `spec.KV_CACHE_DTYPES`. Raises UserError as `spec.row` does.
    """
    return zeros(kv_cache_spec.entry_format(model, kind, layout), pages, entries_per_page)


def zeros(row: kv_cache_spec.EntryFormat, pages: int, slots: int) -> EntryPool:
    """Empty pool of such rows."""
    planes = {name: jnp.zeros((pages, slots, count), dtype) for name, (count, dtype) in row.planes.items()}
    if row.group:
        return QuantizedPool(
            planes["values"], planes["scales"], Bf16Pool(planes["rotary"]) if row.rotary else None, row
        )
    return Bf16Pool(planes["rows"]) if row.format == "bfloat16" else FloatPool(planes["rows"])
