"""In which order a full tier lets things go: by last use, or by whether they were used at all.

A policy is told of everything that enters, is used or leaves, and names what goes first among what may go at all (the
shelf says what: nothing that something else hangs on). One request counts as one use of what it reads, however long
it lasts.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Protocol

from v4jax.cache.offload.block_file import BlockKey

_SMALL = 0.1  # of the budget, for what is new
_MOST_USES = 3  # that are remembered, and so rounds that a key stays without being used


class EvictionPolicy(Protocol):
    """add: a new key. use: one request uses these, which are there. free: nothing hangs on it any more. first: the key
    to go, still there; None if none may. may_go: asked again and again, for it changes."""

    def __init__(self, budget: int, may_go: Callable[[BlockKey], bool]): ...
    def add(self, key: BlockKey, size: int) -> None: ...
    def touch(self, keys: Iterable[BlockKey]) -> None: ...
    def remove(self, key: BlockKey) -> None: ...
    def release(self, key: BlockKey) -> None: ...
    def victim(self) -> BlockKey | None: ...


class _RankQueue:
    """Keys by rank, the lowest first, of which only those that may go are ever looked at."""

    def __init__(self, may_go: Callable[[BlockKey], bool]):
        self._evictable, self._rank, self._heap = (
            may_go,
            {},
            [],
        )  # what lies in the heap is stale if its rank is another

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._rank

    def put(self, key: BlockKey, rank: int) -> None:
        """Enter a key, or give it another rank."""
        self._rank[key] = rank
        self.release(key)

    def release(self, key: BlockKey) -> None:
        """It may go now, perhaps."""
        if self._evictable(key):
            heapq.heappush(self._heap, (self._rank[key], key))
        if len(self._heap) > 4 * len(self._rank) + 64:
            self._heap = [(rank, key) for key, rank in self._rank.items() if self._evictable(key)]
            heapq.heapify(self._heap)

    def remove(self, key: BlockKey) -> None:
        del self._rank[key]

    def victim(self) -> BlockKey | None:
        """The key that goes first; None if none may."""
        while self._heap:
            rank, key = self._heap[0]
            if self._rank.get(key) == rank and self._evictable(key):
                return key
            heapq.heappop(self._heap)
        return None


class LRUPolicy:
    """The least recently used goes first."""

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
    """What is new waits in a small queue and goes from there, first come first gone, unless it was used (Yang et al.,
    SOSP 2023, "FIFO queues are all you need for cache eviction").

    What was used moves to the main queue, where each use is good for one more round. Of what went unused the key is
    remembered, up to what would fill the tier once more: if it comes again, it goes to the main queue at once.
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
