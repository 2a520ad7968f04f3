"""Base class of the pools of main entries and index keys, and the pool of plain floats. Other formats: `pools`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from v4jax.core.pytree import pytree
from v4jax.core.qtensor import QTensor
from v4jax.kernels.attention import PagedOperands
from v4jax.parallel.host_memory import host_gather, host_scatter


class EntryPool:
    """Base class of the pools of entries or index keys: arrays [blocks, slots, ...], addressed by block and slot.

    A subclass defines the storage format by `shape`, `encode` and `decode`.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """(blocks, rows per block, row width)."""
        raise NotImplementedError

    def encode(self, rows: jax.Array) -> EntryPool:
        """Encode `rows` [..., width] into the storage format, as a pool of arrays [..., n]."""
        raise NotImplementedError

    def decode(self, compute: jnp.dtype) -> jax.Array:
        """Decode all rows of this pool to [..., width] in dtype `compute`."""
        raise NotImplementedError

    def raw_fp8(self) -> QTensor | None:
        """Return the stored rows undecoded if the format is plain e4m3 with scales, else None."""
        return None

    def operands(self, block_table_BA: jax.Array, compute: jnp.dtype) -> PagedOperands | None:
        """Return the pool's planes with a block table, to be decoded to `compute`; None if no kernel can read them."""
        return None

    def write(self, page: jax.Array, slot: jax.Array, rows: jax.Array) -> EntryPool:
        """Write `rows` [..., width] at int32 block [...] and slot [...]; drop those out of range."""
        return jax.tree.map(lambda a, new: host_scatter(a, new, page, slot), self, self.encode(rows))

    def gather(self, page: jax.Array, slot: jax.Array, compute: jnp.dtype) -> jax.Array:
        """Read rows [..., width] as `compute` at block [...] and slot [...]; out of range, an arbitrary row."""
        return jax.tree.map(lambda a: host_gather(a, page, slot), self).decode(compute)

    def gather_blocks(self, page: jax.Array) -> EntryPool:
        """Read all rows of the given blocks, undecoded, as a pool of arrays [..., slots, n]."""
        return jax.tree.map(lambda a: host_gather(a, page), self)


@pytree
class FloatPool(EntryPool):
    """A pool that stores rows in a plain float dtype: array [blocks, slots, width]."""

    array: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """(blocks, rows per block, row width)."""
        return self.array.shape

    def encode(self, rows: jax.Array) -> FloatPool:
        """Cast `rows` [..., width] to the pool's dtype."""
        return FloatPool(rows.astype(self.array.dtype))

    def decode(self, compute: jnp.dtype) -> jax.Array:
        """Cast all rows to dtype `compute`."""
        return self.array.astype(compute)

    def operands(self, block_table_BA: jax.Array, compute: jnp.dtype) -> PagedOperands:
        return PagedOperands(self.array, None, None, block_table_BA, 0, self.array.dtype.name, jnp.dtype(compute))
