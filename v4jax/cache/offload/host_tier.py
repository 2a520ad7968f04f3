"""Tiers of storage for blocks and records that are not on the device: host memory, and files in a directory.

A tier may lose what it was given and may refuse to take more; it never gives bytes that it has not verified. So a fault
costs time, nothing else. Every tier counts what happens to it, and holds its budget at every moment.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from v4jax.cache.offload.block_file import BlockKey, BlockSchema, checksum
from v4jax.cache.offload.tier_index import TierIndex

if TYPE_CHECKING:
    import jax  # what needs the tiers alone starts without it

_PAUSE, _MOST_PAUSE = 5.0, 300.0  # seconds without a try after trouble; doubles up to the second


class StoredBlock(NamedTuple):
    """One block or record: its bytes (uint8 [bytes], a numpy array or one of JAX in host memory) and their checksum."""

    schema: BlockSchema
    block_hash: bytes
    parent: bytes
    payload: np.ndarray | jax.Array
    checksum: int

    @property
    def key(self) -> BlockKey:
        return self.schema.key(self.block_hash)

    @property
    def is_intact(self) -> bool:
        """Whether the bytes still have their checksum."""
        return checksum(np.asarray(self.payload)) == self.checksum


class CircuitBreaker:
    """Opens at `limit` failures in a row: then nothing is tried for a while, and twice as long if the next try
    fails."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, limit: int = 3):
        self._clock, self._limit = clock, limit
        self._failures, self._pause, self._until = 0, _PAUSE, 0.0

    @property
    def open(self) -> bool:
        """Whether nothing is to be tried now."""
        return self._clock() < self._until

    def failed(self) -> None:
        """A try failed. Those that began before it opened do not count again."""
        self._failures += 1
        if self._failures >= self._limit and not self.open:
            self._until = self._clock() + self._pause
            self._pause = min(2 * self._pause, _MOST_PAUSE)

    def worked(self) -> None:
        """A try did not fail."""
        self._failures, self._pause, self._until = 0, _PAUSE, 0.0


class HostTier:
    """Items in the memory of this process. policy: what goes first (`policy.POLICIES`)."""

    def __init__(self, budget: int, policy: str):
        self._limits = budget, policy
        self._shelf, self._items = TierIndex(*self._limits), {}
        self._lock = threading.Lock()
        self._count = Counter(evictions=0, refused=0, corrupt=0, bytes_in=0, bytes_out=0)

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._shelf

    def get(self, schema: BlockSchema, block_hash: bytes) -> StoredBlock | None:
        """The item, verified; None if it is not (or no longer) here, or was damaged and is therefore forgotten."""
        with self._lock:
            item = self._items.get(schema.key(block_hash))
        if item is None:
            return None
        sound = item.is_intact
        with self._lock:
            self._count.update(bytes_out=schema.nbytes) if sound else self._count.update(corrupt=1)
        if not sound:
            self.discard(item.key)
            return None
        return item

    def put(self, item: StoredBlock) -> tuple[bool, list[StoredBlock]]:
        """(whether it is here now, what had to go to make room)."""
        gone = []
        with self._lock:
            if item.key in self._shelf:
                return True, gone
            if item.schema.nbytes > self._shelf.budget:
                self._count.update(refused=1)
                return False, gone
            while not self._shelf.has_room(item.schema.nbytes):
                key = self._shelf.next_victim()
                self._shelf.remove(key)
                gone.append(self._items.pop(key))
            self._shelf.add(item.key, item.parent, item.schema.nbytes)
            self._items[item.key] = item
            self._count.update(evictions=len(gone), bytes_in=item.schema.nbytes)
        return True, gone

    def touch(self, keys: Iterable[BlockKey]) -> None:
        """One request uses these keys, as far as they are here."""
        with self._lock:
            self._shelf.touch(keys)

    def discard(self, key: BlockKey) -> None:
        """Forget an item, if it is here."""
        with self._lock:
            if self._shelf.remove(key) is not None:
                del self._items[key]

    def stats(self) -> dict[str, float]:
        """Counts since the start, and what is here now."""
        with self._lock:
            held = {"blocks": self._shelf.count["block"], "records": self._shelf.count["record"]}
            return held | {"bytes": self._shelf.used, "budget": self._shelf.budget, **self._count}

    def check_invariants(self) -> None:
        """Raise AssertionError if the books do not add up."""
        with self._lock:
            self._shelf.check_invariants()
            if self._items.keys() != self._shelf.entries.keys():
                raise AssertionError("the host tier's items and books differ")

    def close(self) -> None:
        """Let everything go."""
        with self._lock:
            self._shelf, self._items = TierIndex(*self._limits), {}
