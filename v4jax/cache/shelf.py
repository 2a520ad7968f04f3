"""What one storage tier holds, by key, within a budget of bytes, and what goes first when it is full.

Of the entries that nothing hangs on, the policy says which (`cache.policy`): a block goes after the blocks that follow
it and after the record that stands behind it, because those could not be used without it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from v4jax.cache.manifest import KINDS, Key
from v4jax.cache.policy import POLICIES


@dataclass
class Entry:
    """size: bytes charged to the budget."""

    parent: bytes
    size: int


class Shelf:
    """Books alone, no bytes. The owner holds a lock around every call. policy: one of `policy.POLICIES`."""

    def __init__(self, budget: int, policy: str):
        self.budget, self.used = budget, 0
        self.entries: dict[Key, Entry] = {}
        self.count = dict.fromkeys(KINDS, 0)
        self._blocks: defaultdict[bytes, set[Key]] = defaultdict(set)  # by name; several only if forms differ
        self._hanging: Counter[bytes] = Counter()  # by name of a block: the entries that need it
        self._policy = POLICIES[policy](budget, self._is_leaf)
        self.watch: Callable[[Key], None] | None = None  # told of every key that leaves

    def __contains__(self, key: Key) -> bool:
        return key in self.entries

    def fits(self, size: int) -> bool:
        """Whether so many bytes more are within the budget."""
        return self.used + size <= self.budget

    def add(self, key: Key, parent: bytes, size: int) -> None:
        """Enter a new key. Raises ValueError if it is there already or does not fit."""
        if key in self.entries or not self.fits(size):
            raise ValueError(f"{key} is there already, or {size} bytes do not fit")
        self.entries[key] = Entry(parent, size)
        self.used += size
        self.count[key.kind] += 1
        self._hanging[_needed(key, parent)] += 1
        if key.kind == "block":
            self._blocks[key.name].add(key)
        self._policy.add(key, size)

    def remove(self, key: Key) -> Entry | None:
        """Strike a key out; None if it is not there."""
        entry = self.entries.pop(key, None)
        if entry is None:
            return None
        self._policy.remove(key)
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
                self._policy.free(block)
        if self.watch is not None:
            self.watch(key)
        return entry

    def touch(self, keys: Iterable[Key]) -> None:
        """One request uses these keys: all at the same moment, however long it lasts."""
        self._policy.use([key for key in keys if key in self.entries])

    def oldest(self) -> Key | None:
        """The key that goes first, still there; None if there is none."""
        first = self._policy.first()
        return first if first is not None else next(iter(self.entries), None)  # forged names may hang in a ring

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


def _needed(key: Key, parent: bytes) -> bytes:
    """Name of the block without which an entry is of no use: the one before a block, the one behind a record."""
    return parent if key.kind == "block" else key.name
