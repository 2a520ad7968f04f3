"""Entries in host memory, and copies on the device of those that decode steps picked last.

The host's pool is always whole: new entries are written there, and their copies, if there are any, are forgotten. So a
copy never holds anything that is not in the pool, and the tokens can't depend on what happens to be copied.
"""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from v4jax.core.pytree import pytree
from v4jax.parallel.host_memory import host_gather, host_scatter

_AT_ONCE = 128  # entries that one turn of the loop fetches: a step with none to fetch costs no turn
_NONE = -1


class Far(Protocol):
    """A pool in host memory. `fetch`: a pool whose arrays [..., n] are the stored bits of rows at page and slot."""

    def fetch(self, page: jax.Array, slot: jax.Array): ...


@pytree
class DeviceEntryCache:
    """Copies of the entries that were picked last, by least recent use.

    rows: a pool of one page, [1, 1 + copies, width]; its row 0 is never written and reads as zeros. at_ZP int32
    [pages, slots]: the row that holds an entry of the host's pool, 0 for none. entry_S int32 [1 + copies]: the reverse,
    page * slots + slot or -1. used_S uint32 [1 + copies]: the step that last asked for it. count_5 uint32: steps, and
    low and high words of the picks that were found here and of those that were fetched.
    """

    rows: object
    slot_of_entry_ZP: jax.Array
    entry_of_slot_S: jax.Array
    last_used_S: jax.Array
    counters_5: jax.Array

    def fetch(
        self, far: Far, page: jax.Array, slot: jax.Array, wanted: jax.Array
    ) -> tuple[DeviceEntryCache, jax.Array]:
        """(the copies with those of the wanted entries among them, their rows int32 [B, T, K], 0 for unwanted ones).

        page, slot int32, wanted bool [B, T, K], of each query distinct entries; there are at least as many copies as
        numbers in them, so nothing that is wanted now has to go.
        """
        shape, (_, slots) = page.shape, self.slot_of_entry_ZP.shape
        page_R, slot_R, wanted_R = (a.reshape(-1) for a in (page, slot, wanted))
        at_R = jnp.where(wanted_R, host_gather(self.slot_of_entry_ZP, page_R, slot_R), 0)
        missing_R, at_ZP = wanted_R & (at_R == 0), self.slot_of_entry_ZP
        if shape[0] * shape[1] > 1:  # of several queries that miss the same entry one fetches it
            claim_R = -1 - jnp.arange(page_R.shape[0], dtype=jnp.int32)
            at_ZP = host_scatter(at_ZP, claim_R, jnp.where(missing_R, page_R, _NONE), slot_R)
            missing_R &= host_gather(at_ZP, page_R, slot_R) == claim_R
        entry_R, now = page_R * slots + slot_R, self.counters_5[0] + 1
        used_S, few = self.last_used_S.at[at_R].set(now), min(_AT_ONCE, page_R.shape[0])

        def turn(_, carry):
            rows, at_ZP, entry_S, used_S, missing_R = carry
            found, which = jax.lax.top_k(missing_R.astype(jnp.float32), few)
            age = (now - used_S[1:]).astype(jnp.float32)
            row = jnp.where(found > 0, jax.lax.top_k(age, few)[1] + 1, entry_S.shape[0])
            fetched = far.fetch(page_R[which], slot_R[which])
            rows = jax.tree.map(lambda a, new: host_scatter(a, new, jnp.zeros_like(row), row), rows, fetched)
            comes = jnp.where(found > 0, entry_R[which], _NONE)
            goes = jnp.where(found > 0, host_gather(entry_S, row), _NONE)
            both, values = jnp.concatenate([comes, goes]), jnp.concatenate([row, jnp.zeros_like(row)])
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
        at_R = jnp.where(wanted_R, host_gather(carry[1], page_R, slot_R), 0)
        return DeviceEntryCache(*carry[:4], _counted(self.counters_5, wanted_R.sum() - fetched, fetched)), at_R.reshape(
            shape
        )

    def lookup(self, page: jax.Array, slot: jax.Array) -> jax.Array:
        """The rows that hold these entries, int32 of any shape; 0 for what is not here, or out of range."""
        pages, slots = self.slot_of_entry_ZP.shape
        real = (page >= 0) & (page < pages) & (slot < slots)
        return jnp.where(real, host_gather(self.slot_of_entry_ZP, page, slot), 0)

    def invalidate(self, page: jax.Array, slot: jax.Array, row: jax.Array) -> DeviceEntryCache:
        """Without copies of these entries, which `found` found in these rows."""
        return DeviceEntryCache(
            self.rows,
            host_scatter(self.slot_of_entry_ZP, 0, page, slot),
            host_scatter(self.entry_of_slot_S, _NONE, row),
            host_scatter(self.last_used_S, 0, row),
            self.counters_5,
        )

    def invalidate_blocks(self, page_A: jax.Array) -> DeviceEntryCache:
        """Without copies of the entries of these pages; numbers out of range are passed over."""
        entries = page_A[:, None], jnp.arange(self.slot_of_entry_ZP.shape[1], dtype=jnp.int32)[None]
        return self.invalidate(*entries, self.lookup(*entries))


def new_device_entry_cache(rows, pages: int, slots: int) -> DeviceEntryCache:
    """Empty copies in `rows`, a pool of zeros of one page, of the entries of a host's pool of so many pages."""
    size = rows.shape[1]
    return DeviceEntryCache(
        rows,
        jnp.zeros((pages, slots), jnp.int32),
        jnp.full(size, _NONE, jnp.int32),
        jnp.zeros(size, jnp.uint32),
        jnp.zeros(5, jnp.uint32),
    )


def read_counters(count_5: np.ndarray) -> np.ndarray:
    """int64 [2]: picks that were found, and those that were fetched."""
    return count_5[1::2] + (count_5[2::2].astype(np.int64) << 32)


def _counted(count_5: jax.Array, *more: jax.Array) -> jax.Array:
    """One step later: the two counters of 64 bits that much higher."""
    out = [count_5[0] + 1]
    for low, high, add in zip(count_5[1::2], count_5[2::2], more, strict=True):
        new = low + add.astype(jnp.uint32)
        out += [new, high + (new < low)]
    return jnp.stack(out)
