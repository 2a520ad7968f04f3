"""Eviction policies of a full tier: least recently used, and S3-FIFO.

A policy is notified when a key is added, used or removed, and chooses the victim among the evictable keys. The tier's
index (`tier_index.TierIndex`) decides which keys are evictable: those that no other entry depends on. One request
counts as one use of each key that it reads, however long the request lasts.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Protocol

from v4jax.cache.offload.block_file import BlockKey

_SMALL = 0.1  # share of the byte budget for the small queue of S3-FIFO, which holds new keys
_MOST_USES = 3  # cap of the use counter, and so of the rounds that an unused key stays in the main queue


class EvictionPolicy(Protocol):
    """Order in which a tier evicts its keys. The owner holds a lock around every call.

    The constructor takes the byte budget of the tier and `may_go`, which returns whether a key is evictable now. The
    answer changes over time, so the policy asks again for every victim.
    """

    def __init__(self, budget: int, may_go: Callable[[BlockKey], bool]): ...

    def add(self, key: BlockKey, size: int) -> None:
        """Add a new key, whose entry takes `size` bytes of the budget."""

    def touch(self, keys: Iterable[BlockKey]) -> None:
        """Count one use of keys by one request. All of them are in the tier."""

    def remove(self, key: BlockKey) -> None:
        """Remove a key, whether it was the victim or not."""

    def release(self, key: BlockKey) -> None:
        """Note that no entry depends on a key any more, so that it may have become evictable."""

    def victim(self) -> BlockKey | None:
        """Return the key to evict next, without removing it; None if no key is evictable."""


class _RankQueue:
    """Priority queue of keys, lowest rank first. Its heap holds only keys that were evictable when they were pushed."""

    def __init__(self, may_go: Callable[[BlockKey], bool]):
        self._evictable = may_go
        self._rank: dict[BlockKey, int] = {}
        self._heap: list[tuple[int, BlockKey]] = []  # an item is stale if its rank is not the present rank of its key

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._rank

    def put(self, key: BlockKey, rank: int) -> None:
        """Add a key, or change its rank."""
        self._rank[key] = rank
        self.release(key)

    def release(self, key: BlockKey) -> None:
        """Push a key onto the heap if it is evictable; rebuild the heap if it is mostly stale."""
        if self._evictable(key):
            heapq.heappush(self._heap, (self._rank[key], key))
        if len(self._heap) > 4 * len(self._rank) + 64:
            self._heap = [(rank, key) for key, rank in self._rank.items() if self._evictable(key)]
            heapq.heapify(self._heap)

    def remove(self, key: BlockKey) -> None:
        del self._rank[key]

    def victim(self) -> BlockKey | None:
        """The evictable key of lowest rank; None if no key is evictable."""
        while self._heap:
            rank, key = self._heap[0]
            if self._rank.get(key) == rank and self._evictable(key):
                return key
            heapq.heappop(self._heap)
        return None


class LRUPolicy:
    """Least recently used: evicts the key whose last use is oldest."""

    def __init__(self, budget: int, may_go: Callable[[BlockKey], bool]):
        self._queue, self._clock = _RankQueue(may_go), 0

    def add(self, key: BlockKey, size: int) -> None:
        self.touch([key])

    def touch(self, keys: Iterable[BlockKey]) -> None:
        self._clock += 1
        for key in keys:
            self._queue.put(key, self._clock)

    def remove(self, key: BlockKey) -> None:
        self._queue.remove(key)

    def release(self, key: BlockKey) -> None:
        self._queue.release(key)

    def victim(self) -> BlockKey | None:
        return self._queue.victim()


class S3FIFOPolicy:
    """S3-FIFO (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023).

    New keys enter a small FIFO queue and are evicted from there unless they were used. Used keys move to the main FIFO
    queue, where each use buys one more round. Keys that are removed from the tier while in the small queue
    are remembered as ghosts, up to one budget of bytes. A ghost that is added again enters the main queue at once.
    """

    def __init__(self, budget: int, may_go: Callable[[BlockKey], bool]):
        self._budget, self._small, self._main = budget, _RankQueue(may_go), _RankQueue(may_go)
        self._size, self._uses, self._clock = {}, {}, 0
        self._small_bytes = self._ghost_bytes = 0
        self._ghosts: OrderedDict[BlockKey, int] = OrderedDict()

    def add(self, key: BlockKey, size: int) -> None:
        self._size[key], self._uses[key] = size, 0
        if key in self._ghosts:
            self._ghost_bytes -= self._ghosts.pop(key)
            self._enter(self._main, key)
        else:
            self._enter(self._small, key)

    def _enter(self, queue: _RankQueue, key: BlockKey) -> None:
        self._clock += 1
        queue.put(key, self._clock)
        self._small_bytes += self._size[key] * (queue is self._small)

    def touch(self, keys: Iterable[BlockKey]) -> None:
        for key in keys:
            self._uses[key] = min(self._uses[key] + 1, _MOST_USES)

    def remove(self, key: BlockKey) -> None:
        size = self._size.pop(key)
        del self._uses[key]
        if key in self._main:
            self._main.remove(key)
            return
        self._small.remove(key)
        self._small_bytes -= size
        self._ghosts[key] = size
        self._ghost_bytes += size
        while self._ghost_bytes > self._budget:
            self._ghost_bytes -= self._ghosts.popitem(last=False)[1]

    def release(self, key: BlockKey) -> None:
        (self._main if key in self._main else self._small).release(key)

    def victim(self) -> BlockKey | None:
        while True:
            queues = (self._small, self._main)
            order = queues if self._small_bytes > _SMALL * self._budget else queues[::-1]
            found = next(((queue, key) for queue in order if (key := queue.victim()) is not None), None)
            if found is None:
                return None
            queue, key = found
            if not self._uses[key]:
                return key
            if queue is self._small:
                self._uses[key] = 0
                queue.remove(key)
                self._small_bytes -= self._size[key]
            else:
                self._uses[key] -= 1
            self._enter(self._main, key)


POLICIES: dict[str, type[EvictionPolicy]] = {"lru": LRUPolicy, "s3fifo": S3FIFOPolicy}
