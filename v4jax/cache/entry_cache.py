"""Device cache of host-resident CSA entries: an LRU cache of the entries that decode steps read.

The pool in host memory is always complete. A new entry is written to the pool, and its cached copy, if there is one, is
invalidated. A copy therefore always equals the pool's entry, so outputs do not depend on which entries are cached.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from v4jax.core.pytree import pytree
from v4jax.parallel.host_memory import host_gather, host_scatter

if TYPE_CHECKING:
    from v4jax.cache.entry_pool import EntryPool

_AT_ONCE = 128  # entries that one loop iteration fetches; a step without misses runs no iteration
_NONE = -1  # no entry


@runtime_checkable
class HostPool(Protocol):
    """A pool of entries in host memory."""

    def fetch(self, page: jax.Array, slot: jax.Array) -> EntryPool:
        """Copy the encoded rows at int32 block [...] and slot [...] to the device, as a pool of arrays [..., n]."""
        ...


@pytree
class DeviceEntryCache:
    """LRU cache on the device for the entries of one layer's pool in host memory.

    Attributes:
      rows: encoded rows, a pool of one block [1, 1 + copies, width]. Row 0 is never written and reads as zeros.
      slot_of_entry_ZP: int32 [blocks, slots], the row that caches each entry of the host pool; 0 if none does.
      entry_of_slot_S: int32 [1 + copies], the entry in each row, block * slots + slot; -1 for an empty row.
      last_used_S: uint32 [1 + copies], the step that last read each row.
      counters_5: uint32 [5], number of steps, then hits and misses as (low, high) words of 64 bits.
    """

    rows: EntryPool
    slot_of_entry_ZP: jax.Array
    entry_of_slot_S: jax.Array
    last_used_S: jax.Array
    counters_5: jax.Array

    def fetch(
        self, host_pool: HostPool, page: jax.Array, slot: jax.Array, wanted: jax.Array
    ) -> tuple[DeviceEntryCache, jax.Array]:
        """Fetch the wanted entries that are not cached, evicting the least recently used rows.

        Args:
          host_pool: the pool in host memory.
          page: int32 [B, T, K], block of each entry.
          slot: int32 [B, T, K], slot of each entry in its block. The entries of one query are distinct. The cache has
            at least B * T * K rows, so no wanted entry is evicted.
          wanted: bool [B, T, K], False for entries that are not read.

        Returns:
          The cache, which holds all wanted entries, and their rows, int32 [B, T, K], 0 for unwanted ones.
        """
        shape = page.shape
        slots = self.slot_of_entry_ZP.shape[1]
        page_R, slot_R, wanted_R = (a.reshape(-1) for a in (page, slot, wanted))
        at_R = jnp.where(wanted_R, host_gather(self.slot_of_entry_ZP, page_R, slot_R), 0)
        missing_R = wanted_R & (at_R == 0)
        at_ZP = self.slot_of_entry_ZP
        if shape[0] * shape[1] > 1:  # if several queries miss the same entry, one fetches it
            claim_R = -1 - jnp.arange(page_R.shape[0], dtype=jnp.int32)
            at_ZP = host_scatter(at_ZP, claim_R, jnp.where(missing_R, page_R, _NONE), slot_R)
            missing_R &= host_gather(at_ZP, page_R, slot_R) == claim_R
        entry_R = page_R * slots + slot_R
        now = self.counters_5[0] + 1
        used_S = self.last_used_S.at[at_R].set(now)
        few = min(_AT_ONCE, page_R.shape[0])

        def turn(_, carry):
            rows, at_ZP, entry_S, used_S, missing_R = carry
            found, which = jax.lax.top_k(missing_R.astype(jnp.float32), few)
            age = (now - used_S[1:]).astype(jnp.float32)
            row = jnp.where(found > 0, jax.lax.top_k(age, few)[1] + 1, entry_S.shape[0])
            fetched = host_pool.fetch(page_R[which], slot_R[which])
            rows = jax.tree.map(lambda a, new: host_scatter(a, new, jnp.zeros_like(row), row), rows, fetched)
            comes = jnp.where(found > 0, entry_R[which], _NONE)
            goes = jnp.where(found > 0, host_gather(entry_S, row), _NONE)
            both = jnp.concatenate([comes, goes])
            values = jnp.concatenate([row, jnp.zeros_like(row)])
            at_ZP = host_scatter(at_ZP, values, both // slots, both % slots)
            return (
                rows,
                at_ZP,
                host_scatter(entry_S, comes, row),
                host_scatter(used_S, now, row),
                missing_R.at[which].set(False),
            )

        fetched = missing_R.sum()
        carry = (self.rows, at_ZP, self.entry_of_slot_S, used_S, missing_R)
        carry = jax.lax.fori_loop(0, -(-fetched // few), turn, carry)
        rows, at_ZP, entry_S, used_S, _ = carry
        at_R = jnp.where(wanted_R, host_gather(at_ZP, page_R, slot_R), 0)
        counters_5 = _counted(self.counters_5, wanted_R.sum() - fetched, fetched)
        return DeviceEntryCache(rows, at_ZP, entry_S, used_S, counters_5), at_R.reshape(shape)

    def lookup(self, page: jax.Array, slot: jax.Array) -> jax.Array:
        """Return the rows that cache the entries at int32 block [...] and slot [...]; 0 if absent or out of range."""
        pages, slots = self.slot_of_entry_ZP.shape
        real = (page >= 0) & (page < pages) & (slot < slots)
        return jnp.where(real, host_gather(self.slot_of_entry_ZP, page, slot), 0)

    def invalidate(self, page: jax.Array, slot: jax.Array, row: jax.Array) -> DeviceEntryCache:
        """Drop the cached entries at block [...] and slot [...], for which `lookup` returned `row` [...]."""
        return DeviceEntryCache(
            self.rows,
            host_scatter(self.slot_of_entry_ZP, 0, page, slot),
            host_scatter(self.entry_of_slot_S, _NONE, row),
            host_scatter(self.last_used_S, 0, row),
            self.counters_5,
        )

    def invalidate_blocks(self, page_A: jax.Array) -> DeviceEntryCache:
        """Drop all cached entries of the int32 blocks `page_A`. Numbers out of range are ignored."""
        entries = page_A[:, None], jnp.arange(self.slot_of_entry_ZP.shape[1], dtype=jnp.int32)[None]
        return self.invalidate(*entries, self.lookup(*entries))


def new_device_entry_cache(rows: EntryPool, pages: int, slots: int) -> DeviceEntryCache:
    """Allocate an empty device cache.

    Args:
      rows: pool of one block of zeros, [1, 1 + copies, width].
      pages: number of blocks of the host pool.
      slots: entries per block of the host pool.
    """
    size = rows.shape[1]
    return DeviceEntryCache(
        rows,
        jnp.zeros((pages, slots), jnp.int32),
        jnp.full(size, _NONE, jnp.int32),
        jnp.zeros(size, jnp.uint32),
        jnp.zeros(5, jnp.uint32),
    )


def read_counters(count_5: np.ndarray) -> np.ndarray:
    """Return (hits, misses), int64 [2], of `DeviceEntryCache.counters_5` as a uint32 array [5]."""
    return count_5[1::2] + (count_5[2::2].astype(np.int64) << 32)


def _counted(count_5: jax.Array, *more: jax.Array) -> jax.Array:
    """Add one step, and `more` to the two 64-bit counters."""
    out = [count_5[0] + 1]
    for low, high, add in zip(count_5[1::2], count_5[2::2], more, strict=True):
        new = low + add.astype(jnp.uint32)
        out += [new, high + (new < low)]
    return jnp.stack(out)
