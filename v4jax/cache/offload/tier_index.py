"""Index of one storage tier: its keys, its byte budget and the order of eviction.

The policy (`cache.kv_eviction_policy`) chooses a victim among the entries that no other entry depends on. A block is
evicted after the blocks that follow it and after the state snapshot at its end, which are useless without it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from v4jax.cache.offload.block_file import KINDS, BlockKey
from v4jax.cache.offload.eviction import POLICIES


@dataclass
class IndexEntry:
    """size: bytes charged to the budget."""

    parent: bytes
    size: int


class TierIndex:
    """Books alone, no bytes. The owner holds a lock around every call. policy: one of `policy.POLICIES`."""

    def __init__(self, budget: int, policy: str):
        self.budget, self.used = budget, 0
        self.entries: dict[BlockKey, IndexEntry] = {}
        self.count = dict.fromkeys(KINDS, 0)
        self._blocks: defaultdict[bytes, set[BlockKey]] = defaultdict(set)  # by name; several only if forms differ
        self._dependents: Counter[bytes] = Counter()  # by name of a block: the entries that need it
        self._policy = POLICIES[policy](budget, self._is_leaf)

    def __contains__(self, key: BlockKey) -> bool:
        return key in self.entries

    def has_room(self, size: int) -> bool:
        """Whether so many bytes more are within the budget."""
        return self.used + size <= self.budget

    def add(self, key: BlockKey, parent: bytes, size: int) -> None:
        """Enter a new key. Raises ValueError if it is there already or does not fit."""
        if key in self.entries or not self.has_room(size):
            raise ValueError(f"{key} is there already, or {size} bytes do not fit")
        self.entries[key] = IndexEntry(parent, size)
        self.used += size
        self.count[key.kind] += 1
        self._dependents[_required_block(key, parent)] += 1
        if key.kind == "block":
            self._blocks[key.block_hash].add(key)
        self._policy.add(key, size)

    def remove(self, key: BlockKey) -> IndexEntry | None:
        """Strike a key out; None if it is not there."""
        entry = self.entries.pop(key, None)
        if entry is None:
            return None
        self._policy.remove(key)
        self.used -= entry.size
        self.count[key.kind] -= 1
        if key.kind == "block":
            self._blocks[key.block_hash].discard(key)
            if not self._blocks[key.block_hash]:
                del self._blocks[key.block_hash]
        needed = _required_block(key, entry.parent)
        self._dependents[needed] -= 1
        if not self._dependents[needed]:
            del self._dependents[needed]
            for block in self._blocks.get(needed, ()):
                self._policy.release(block)
        return entry

    def touch(self, keys: Iterable[BlockKey]) -> None:
        """One request uses these keys: all at the same moment, however long it lasts."""
        self._policy.touch([key for key in keys if key in self.entries])

    def next_victim(self) -> BlockKey | None:
        """The key that goes first, still there; None if there is none."""
        first = self._policy.victim()
        return first if first is not None else next(iter(self.entries), None)  # forged names may hang in a ring

    def check_invariants(self) -> None:
        """Raise AssertionError if the books do not add up, in time linear in the entries."""
        sizes = sum(entry.size for entry in self.entries.values())
        hanging = Counter(_required_block(key, entry.parent) for key, entry in self.entries.items())
        blocks = {key for keys in self._blocks.values() for key in keys}
        if not (self.used == sizes <= self.budget and self._dependents == hanging):
            raise AssertionError("the books of a tier are wrong: bytes, or what hangs on what")
        wanted = {key for key in self.entries if key.kind == "block"}
        if blocks != wanted or sum(self.count.values()) != len(self.entries):
            raise AssertionError("the books of a tier are wrong: keys")

    def _is_leaf(self, key: BlockKey) -> bool:
        return key.kind == "record" or not self._dependents[key.block_hash]


def _required_block(key: BlockKey, parent: bytes) -> bytes:
    """Name of the block without which an entry is of no use: the one before a block, the one behind a record."""
    return parent if key.kind == "block" else key.block_hash
