"""The entries of a paged cache as arrays, for kernels that compute addresses themselves."""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp

from v4jax.core.pytree import pytree
from v4jax.core.qtensor import dequantize


class EntrySource(Protocol):
    """Entries of each batch row, addressed by their index in the row."""

    @property
    def size(self) -> int:
        """Number of entries per row that the storage has room for."""
        ...

    def read_entries(self, first: jax.Array, count: int) -> jax.Array:
        """Return entries first .. first + count - 1 of every row, [B, count, H].

        `first` is an int32 multiple of `count`, so that storage in blocks reads whole blocks where `count` allows. An
        index beyond `size` gives an arbitrary stored entry, which the caller has to mask.
        """
        ...

    def gather_entries(self, pick_BTK: jax.Array) -> tuple[jax.Array, EntrySource]:
        """Return the entries at int32 pick_BTK, [B, T, K, H], and the source after the read.

        A negative index gives some finite entry. The source is returned because a cache may keep the entries that it
        fetched (see `cache/entry_cache.py`).
        """
        ...

    def operands(self) -> PagedOperands | None:
        """Return the arrays that the entries are read from; None if the entries are not in blocks on the device."""
        ...


@pytree
class PagedOperands:
    """Stored entries of one layer and the blocks of each batch row. It is an `EntrySource` itself.

    A stored row consists of planes: values, scales and the rotary part (spec 2.10).

    Attributes:
        values_ZPV: [blocks, entries per block, n], floats, bfloat16 bits as uint16, or uint8 codes.
        scales_ZPG: uint8 [blocks, entries per block, n], an e8m0 scale per group, then padding; None if not quantized.
        rotary_ZPR: bfloat16 bits as uint16 [blocks, entries per block, n], the rotary channels at the end of a row;
            None if the values hold them.
        block_table_BA: int32 [B, A], blocks of each batch row in order; -1 where the row has no block.
        group: numbers per scale; 0 if not quantized.
        format: "fp8" (e4m3) or "fp4" (e2m1, two a byte) if quantized, else the dtype of the row.
        dtype: dtype that rows are decoded to.
    """

    values_ZPV: jax.Array
    scales_ZPG: jax.Array | None
    rotary_ZPR: jax.Array | None
    block_table_BA: jax.Array
    group: int = dataclasses.field(metadata={"static": True})
    format: str = dataclasses.field(metadata={"static": True})
    dtype: jnp.dtype = dataclasses.field(metadata={"static": True})

    @property
    def size(self) -> int:
        """Number of entries that the block table of a row has room for."""
        return self.block_table_BA.shape[1] * self.values_ZPV.shape[1]

    def read_entries(self, first: jax.Array, count: int) -> jax.Array:
        """Return entries first .. first + count - 1 of every row, [B, count, H]."""
        index_C = first + jnp.arange(count)
        return self._rows(jnp.broadcast_to(index_C, (self.block_table_BA.shape[0], count)))

    def gather_entries(self, pick_BTK: jax.Array) -> tuple[jax.Array, PagedOperands]:
        """Return the entries at int32 pick_BTK, [B, T, K, H], and the operands; a negative index reads entry 0."""
        return self._rows(jnp.maximum(pick_BTK, 0)), self

    def operands(self) -> PagedOperands:
        """Return the operands."""
        return self

    def _rows(self, index: jax.Array) -> jax.Array:
        """Decode the entries `index` [B, ...] of each batch row."""
        (_, slots, _), A = self.values_ZPV.shape, self.block_table_BA.shape[1]
        row = jnp.arange(index.shape[0]).reshape(-1, *[1] * (index.ndim - 1))
        block, slot = self.block_table_BA[row, jnp.minimum(index // slots, A - 1)], index % slots
        gather = lambda plane: plane.at[block, slot].get(mode="clip", wrap_negative_indices=False)
        planes = jax.tree.map(gather, (self.values_ZPV, self.scales_ZPG, self.rotary_ZPR))
        return decode_rows(*planes, self.group, self.format, self.dtype)


def decode_rows(
    values: jax.Array,
    scales: jax.Array | None,
    rotary: jax.Array | None,
    group: int,
    format: str,
    dtype: jnp.dtype,
) -> jax.Array:
    """Decode stored rows, given their planes as in `PagedOperands`, to [..., width] in `dtype`.

    `dtype` is float32 or bfloat16 for quantized rows.
    """
    if not group:
        return _as_floats(values).astype(dtype)
    numbers = values.shape[-1] * (2 if format == "fp4" else 1)
    x = dequantize(values, scales[..., : numbers // group], format, dtype)
    if rotary is None:
        return x
    rotary = _as_floats(rotary).astype(dtype)
    # Concatenate in pieces, because XLA:CPU would write the values twice in a concatenation along the last axis.
    piece = math.gcd(x.shape[-1], rotary.shape[-1])
    both = [a.reshape(*a.shape[:-1], -1, piece) for a in (x, rotary)]
    return jnp.concatenate(both, axis=-2).reshape(*x.shape[:-1], x.shape[-1] + rotary.shape[-1])


def _as_floats(plane: jax.Array) -> jax.Array:
    """Bitcast uint16 to bfloat16; return floats unchanged."""
    return jax.lax.bitcast_convert_type(plane, jnp.bfloat16) if plane.dtype == jnp.uint16 else plane
