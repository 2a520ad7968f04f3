"""Pools of one layer's main entries or indexer keys, in every layout (see `nn.state.Pool` for what a pool is).

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
from v4jax.cache import spec
from v4jax.core.qtensor import dequantise, quantise
from v4jax.nn.kept import Plain, Pool, get, put
from v4jax.nn.state import pytree


@pytree
class Bfloat16:
    """A `Pool` of bfloat16 numbers, held as their bits: uint16 [pages, slots, width]."""

    bits: jax.Array

    @property
    def shape(self) -> tuple[int, int, int]:
        """Pages, rows of a page, numbers of a row."""
        return self.bits.shape

    def write(self, page: jax.Array, slot: jax.Array, rows: jax.Array) -> Bfloat16:
        """As `Plain.write`."""
        return Bfloat16(put(self.bits, page, slot, jax.lax.bitcast_convert_type(rows.astype(jnp.bfloat16), jnp.uint16)))

    def take(self, page: jax.Array, slot: jax.Array, compute: jnp.dtype) -> jax.Array:
        """As `Plain.take`."""
        return jax.lax.bitcast_convert_type(get(self.bits, page, slot), jnp.bfloat16).astype(compute)

    def pages(self, page: jax.Array, compute: jnp.dtype) -> jax.Array:
        """As `Plain.pages`."""
        return jax.lax.bitcast_convert_type(get(self.bits, page), jnp.bfloat16).astype(compute)


@pytree
class Quantised:
    """A `Pool` of rows in 8 or 4 bits: planes of values and of scales, and a pool of the rotary ends, if any.

    Only rows that are asked for are dequantised.
    """

    values: jax.Array
    scales: jax.Array
    rotary: Bfloat16 | None
    row: spec.Row = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int, int]:
        """Pages, rows of a page, numbers of a row."""
        return (*self.values.shape[:2], self.row.width)

    def write(self, page: jax.Array, slot: jax.Array, rows: jax.Array) -> Quantised:
        """As `Plain.write`; rows are rounded as spec 2.4 says."""
        split = self.row.width - self.row.rotary
        values, scales = quantise(rows[..., :split], self.row.format, self.row.group)
        spare = self.scales.shape[-1] - scales.shape[-1]
        scales = jnp.pad(scales, [(0, 0)] * (scales.ndim - 1) + [(0, spare)])
        rotary = self.rotary and self.rotary.write(page, slot, rows[..., split:])
        return Quantised(put(self.values, page, slot, values), put(self.scales, page, slot, scales), rotary, self.row)

    def take(self, page: jax.Array, slot: jax.Array, compute: jnp.dtype) -> jax.Array:
        """As `Plain.take`; `compute` is float32 or bfloat16."""
        rotary = self.rotary and self.rotary.take(page, slot, compute)
        return self._floats(get(self.values, page, slot), get(self.scales, page, slot), rotary, compute)

    def pages(self, page: jax.Array, compute: jnp.dtype) -> jax.Array:
        """As `Plain.pages`; `compute` is float32 or bfloat16."""
        rotary = self.rotary and self.rotary.pages(page, compute)
        return self._floats(get(self.values, page), get(self.scales, page), rotary, compute)

    def _floats(self, values: jax.Array, scales: jax.Array, rotary: jax.Array | None, compute: jnp.dtype) -> jax.Array:
        groups = (self.row.width - self.row.rotary) // self.row.group
        x = dequantise(values, scales[..., :groups], self.row.format, compute)
        if rotary is None:
            return x
        # Joined piece by piece: along the last axis XLA:CPU would write the values twice.
        piece = math.gcd(x.shape[-1], self.row.rotary)
        both = [a.reshape(*a.shape[:-1], -1, piece) for a in (x, rotary)]
        return jnp.concatenate(both, axis=-2).reshape(*x.shape[:-1], self.row.width)


def new_pool(model: config.Model, kind: str, pages: int, entries_per_page: int, layout: str) -> Pool:
    """Empty pool of one layer's main entries (kind "main") or indexer keys ("index"); rows read as zeros.

    layout: one of `spec.LAYOUTS`. Raises UserError as `spec.row` does.
    """
    row = spec.row(model, kind, layout)
    planes = {name: jnp.zeros((pages, entries_per_page, count), dtype) for name, (count, dtype) in row.planes.items()}
    if row.group:
        return Quantised(planes["values"], planes["scales"], Bfloat16(planes["rotary"]) if row.rotary else None, row)
    return Bfloat16(planes["rows"]) if row.format == "bfloat16" else Plain(planes["rows"])
