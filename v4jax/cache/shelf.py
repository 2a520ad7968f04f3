"""What one storage tier holds, by key, within a budget of bytes, and what goes first when it is full.

The least recently used entry that nothing hangs on goes first: a block goes after the blocks that follow it and after
the record that stands behind it, because those could not be used without it.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from v4jax.cache.manifest import KINDS, Key


@dataclass
class Entry:
    """size: bytes charged to the budget. used: the larger, the later."""

    parent: bytes
    size: int
    used: int = 0


class Shelf:
    """Books alone, no bytes. The owner holds a lock around every call."""

    def __init__(self, budget: int):
        self.budget, self.used = budget, 0
        self.entries: dict[Key, Entry] = {}
        self.count = dict.fromkeys(KINDS, 0)
        self._blocks: defaultdict[bytes, set[Key]] = defaultdict(set)  # by name; several only if forms differ
        self._hanging: Counter[bytes] = Counter()  # by name of a block: the entries that need it
        self._leaves: list[tuple[int, Key]] = []  # heap; stale unless the entry is a leaf and was not used since
        self._clock = 0
        self.watch: Callable[[Key], None] | None = None  # told of every key that leaves

    def __contains__(self, key: Key) -> bool:
        return key in self.entries

    def fits(self, size: int) -> bool:
        """Whether so many bytes more are within the budget."""
        return self.used + size <= self.budget

    def add(self, key: Key, parent: bytes, size: int) -> None:
        """Enter a new key as the last used. Raises ValueError if it is there already or does not fit."""
        if key in self.entries or not self.fits(size):
            raise ValueError(f"{key} is there already, or {size} bytes do not fit")
        self._clock += 1
        self.entries[key] = Entry(parent, size, self._clock)
        self.used += size
        self.count[key.kind] += 1
        self._hanging[_needed(key, parent)] += 1
        if key.kind == "block":
            self._blocks[key.name].add(key)
        self._offer(key)

    def remove(self, key: Key) -> Entry | None:
        """Strike a key out; None if it is not there."""
        entry = self.entries.pop(key, None)
        if entry is None:
            return None
        self.used -= entry.size
        self.count[key.kind] -= 1
        if key.kind == "block":
            self._blocks[key.name].discard(key)
            if not self._blocks[key.name]:
                del self._blocks[key.name]
        needed = _needed(key, entry.parent)
        self._hanging[needed] -= 1
        if not self._hanging[needed]:
            del self._hanging[needed]
            for block in self._blocks.get(needed, ()):
                self._offer(block)
        if self.watch is not None:
            self.watch(key)
        return entry

    def touch(self, keys: Iterable[Key]) -> None:
        """One request uses these keys: all at the same moment, however long it lasts."""
        self._clock += 1
        for key in keys:
            if (entry := self.entries.get(key)) is not None:
                entry.used = self._clock
                self._offer(key)

    def oldest(self) -> Key | None:
        """The key that goes first, still there; None if there is none."""
        while self._leaves:
            used, key = self._leaves[0]
            if key in self.entries and self._is_leaf(key) and self.entries[key].used == used:
                return key
            heapq.heappop(self._leaves)
        return next(iter(self.entries), None)  # only forged names hang on each other in a ring

    def check(self) -> None:
        """Raise AssertionError if the books do not add up, in time linear in the entries."""
        sizes = sum(entry.size for entry in self.entries.values())
        hanging = Counter(_needed(key, entry.parent) for key, entry in self.entries.items())
        blocks = {key for keys in self._blocks.values() for key in keys}
        if not (self.used == sizes <= self.budget and self._hanging == hanging):
            raise AssertionError("the books of a tier are wrong: bytes, or what hangs on what")
        wanted = {key for key in self.entries if key.kind == "block"}
        if blocks != wanted or sum(self.count.values()) != len(self.entries):
            raise AssertionError("the books of a tier are wrong: keys")

    def _is_leaf(self, key: Key) -> bool:
        return key.kind == "record" or not self._hanging[key.name]

    def _offer(self, key: Key) -> None:
        if self._is_leaf(key):
            heapq.heappush(self._leaves, (self.entries[key].used, key))
        if len(self._leaves) > 4 * len(self.entries) + 64:
            self._leaves = [(entry.used, key) for key, entry in self.entries.items() if self._is_leaf(key)]
            heapq.heapify(self._leaves)


def _needed(key: Key, parent: bytes) -> bytes:
    """Name of the block without which an entry is of no use: the one before a block, the one behind a record."""
    return parent if key.kind == "block" else key.name
