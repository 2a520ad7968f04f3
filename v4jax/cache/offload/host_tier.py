"""The host memory tier for KV blocks and state snapshots that are not on the device, and parts that all tiers share.

A tier may lose an item and may refuse one, but it never returns bytes without verifying their checksum. So a fault
costs time and never changes an answer. Every tier stays within its byte budget at all times and keeps counters.

In identifiers and in the kind of a key, "record" is a state snapshot.
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
    import jax  # for annotations only, so that importing the tiers does not import jax

_PAUSE, _MOST_PAUSE = 5.0, 300.0  # seconds that a breaker stays open: at first, and at most


class StoredBlock(NamedTuple):
    """One KV block or state snapshot with its payload.

    Attributes:
      schema: Layout of the payload.
      block_hash: 16 bytes; hash of the block, or of the block that the state snapshot ends.
      parent: 16 bytes; hash of the preceding block.
      payload: uint8 [schema.nbytes], a numpy array or a JAX array in host memory.
      checksum: xxh3-64 of the payload.
    """

    schema: BlockSchema
    block_hash: bytes
    parent: bytes
    payload: np.ndarray | jax.Array
    checksum: int

    @property
    def key(self) -> BlockKey:
        """Key of the item in a tier."""
        return self.schema.key(self.block_hash)

    @property
    def is_intact(self) -> bool:
        """Whether the payload still matches its checksum."""
        return checksum(np.asarray(self.payload)) == self.checksum


class CircuitBreaker:
    """Stops operations for a while after `limit` consecutive failures.

    The breaker opens for 5 s at first. Each time it opens again without a success in between, the time doubles, up to
    300 s.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, limit: int = 3):
        """Start closed.

        Args:
          clock: Returns the time in seconds.
          limit: Number of consecutive failures that open the breaker.
        """
        self._clock, self._limit = clock, limit
        self._failures, self._pause, self._until = 0, _PAUSE, 0.0

    @property
    def open(self) -> bool:
        """Whether callers must not try the operation now."""
        return self._clock() < self._until

    def failed(self) -> None:
        """Record a failure. While the breaker is open, a failure does not prolong it."""
        self._failures += 1
        if self._failures >= self._limit and not self.open:
            self._until = self._clock() + self._pause
            self._pause = min(2 * self._pause, _MOST_PAUSE)

    def worked(self) -> None:
        """Record a success, which closes the breaker and resets its failure count and its time."""
        self._failures, self._pause, self._until = 0, _PAUSE, 0.0


class HostTier:
    """Tier that holds items in the memory of this process. All methods are safe to call from several threads."""

    def __init__(self, budget: int, policy: str):
        """Start empty.

        Args:
          budget: Payload bytes that the tier may hold.
          policy: Eviction policy, a key of `eviction.POLICIES`.
        """
        self._limits = budget, policy
        self._index, self._items = TierIndex(*self._limits), {}
        self._lock = threading.Lock()
        self._count = Counter(evictions=0, refused=0, corrupt=0, bytes_in=0, bytes_out=0)

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._index

    def get(self, schema: BlockSchema, block_hash: bytes) -> StoredBlock | None:
        """Read and verify an item.

        Returns:
          The item, or None if the tier does not hold it or its checksum does not match. A corrupt item is discarded.
        """
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
        """Add an item, and evict others to make room. The tier refuses an item that is larger than the budget.

        Returns:
          (held, evicted): whether the tier holds the item now, and the items that were evicted for it.
        """
        gone = []
        with self._lock:
            if item.key in self._index:
                return True, gone
            if item.schema.nbytes > self._index.budget:
                self._count.update(refused=1)
                return False, gone
            while not self._index.has_room(item.schema.nbytes):
                key = self._index.next_victim()
                assert key is not None  # an empty index has room for any item within the budget
                self._index.remove(key)
                gone.append(self._items.pop(key))
            self._index.add(item.key, item.parent, item.schema.nbytes)
            self._items[item.key] = item
            self._count.update(evictions=len(gone), bytes_in=item.schema.nbytes)
        return True, gone

    def touch(self, keys: Iterable[BlockKey]) -> None:
        """Count one use by one request of those keys that the tier holds. Other keys are ignored."""
        with self._lock:
            self._index.touch(keys)

    def discard(self, key: BlockKey) -> None:
        """Remove an item if the tier holds it."""
        with self._lock:
            if self._index.remove(key) is not None:
                del self._items[key]

    def stats(self) -> dict[str, float]:
        """Counters since the start, and the number of blocks and snapshots, bytes held and budget now."""
        with self._lock:
            held: dict[str, float] = {"blocks": self._index.count["block"], "snapshots": self._index.count["record"]}
            return held | {"bytes": self._index.used, "budget": self._index.budget, **self._count}

    def check_invariants(self) -> None:
        """Raise AssertionError if the index is inconsistent or does not match the items."""
        with self._lock:
            self._index.check_invariants()
            if self._items.keys() != self._index.entries.keys():
                raise AssertionError("the host tier's items and index differ")

    def close(self) -> None:
        """Remove all items, which frees their memory."""
        with self._lock:
            self._index, self._items = TierIndex(*self._limits), {}
