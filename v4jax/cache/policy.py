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

from v4jax.cache.manifest import Key

_SMALL = 0.1  # of the budget, for what is new
_MOST_USES = 3  # that are remembered, and so rounds that a key stays without being used


class Policy(Protocol):
    """add: a new key. use: one request uses these, which are there. free: nothing hangs on it any more. first: the key
    to go, still there; None if none may. may_go: asked again and again, for it changes."""

    def __init__(self, budget: int, may_go: Callable[[Key], bool]): ...
    def add(self, key: Key, size: int) -> None: ...
    def use(self, keys: Iterable[Key]) -> None: ...
    def remove(self, key: Key) -> None: ...
    def free(self, key: Key) -> None: ...
    def first(self) -> Key | None: ...


class _Queue:
    """Keys by rank, the lowest first, of which only those that may go are ever looked at."""

    def __init__(self, may_go: Callable[[Key], bool]):
        self._may_go, self._rank, self._heap = may_go, {}, []  # what lies in the heap is stale if its rank is another

    def __contains__(self, key: Key) -> bool:
        return key in self._rank

    def put(self, key: Key, rank: int) -> None:
        """Enter a key, or give it another rank."""
        self._rank[key] = rank
        self.free(key)

    def free(self, key: Key) -> None:
        """It may go now, perhaps."""
        if self._may_go(key):
            heapq.heappush(self._heap, (self._rank[key], key))
        if len(self._heap) > 4 * len(self._rank) + 64:
            self._heap = [(rank, key) for key, rank in self._rank.items() if self._may_go(key)]
            heapq.heapify(self._heap)

    def remove(self, key: Key) -> None:
        del self._rank[key]

    def first(self) -> Key | None:
        """The key that goes first; None if none may."""
        while self._heap:
            rank, key = self._heap[0]
            if self._rank.get(key) == rank and self._may_go(key):
                return key
            heapq.heappop(self._heap)
        return None


class Lru:
    """The least recently used goes first."""

    def __init__(self, budget: int, may_go: Callable[[Key], bool]):
        self._queue, self._clock = _Queue(may_go), 0

    def add(self, key: Key, size: int) -> None:
        self.use([key])

    def use(self, keys: Iterable[Key]) -> None:
        self._clock += 1
        for key in keys:
            self._queue.put(key, self._clock)

    def remove(self, key: Key) -> None:
        self._queue.remove(key)

    def free(self, key: Key) -> None:
        self._queue.free(key)

    def first(self) -> Key | None:
        return self._queue.first()


class S3Fifo:
    """What is new waits in a small queue and goes from there, first come first gone, unless it was used (Yang et al.,
    SOSP 2023, "FIFO queues are all you need for cache eviction").

    What was used moves to the main queue, where each use is good for one more round. Of what went unused the key is
    remembered, up to what would fill the tier once more: if it comes again, it goes to the main queue at once.
    """

    def __init__(self, budget: int, may_go: Callable[[Key], bool]):
        self._budget, self._small, self._main = budget, _Queue(may_go), _Queue(may_go)
        self._size, self._uses, self._clock = {}, {}, 0
        self._small_bytes = self._ghost_bytes = 0
        self._ghosts: OrderedDict[Key, int] = OrderedDict()

    def add(self, key: Key, size: int) -> None:
        self._size[key], self._uses[key] = size, 0
        if key in self._ghosts:
            self._ghost_bytes -= self._ghosts.pop(key)
            self._enter(self._main, key)
        else:
            self._enter(self._small, key)

    def _enter(self, queue: _Queue, key: Key) -> None:
        self._clock += 1
        queue.put(key, self._clock)
        self._small_bytes += self._size[key] * (queue is self._small)

    def use(self, keys: Iterable[Key]) -> None:
        for key in keys:
            self._uses[key] = min(self._uses[key] + 1, _MOST_USES)

    def remove(self, key: Key) -> None:
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

    def free(self, key: Key) -> None:
        (self._main if key in self._main else self._small).free(key)

    def first(self) -> Key | None:
        while True:
            queues = (self._small, self._main)
            order = queues if self._small_bytes > _SMALL * self._budget else queues[::-1]
            found = next(((queue, key) for queue in order if (key := queue.first()) is not None), None)
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


POLICIES: dict[str, type[Policy]] = {"lru": Lru, "s3fifo": S3Fifo}
