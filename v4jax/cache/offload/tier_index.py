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
    """One entry of the index.

    Attributes:
      parent: Hash of the preceding block, 16 bytes.
      size: Bytes charged to the budget.
    """

    parent: bytes
    size: int


class TierIndex:
    """Keys, sizes and eviction order of a tier, without the payloads. The owner holds a lock around every call.

    The constructor takes the budget in bytes and the eviction policy, a key of `eviction.POLICIES`.
    """

    def __init__(self, budget: int, policy: str):
        self.budget, self.used = budget, 0
        self.entries: dict[BlockKey, IndexEntry] = {}
        self.count: dict[str, int] = dict.fromkeys(KINDS, 0)
        self._blocks: defaultdict[bytes, set[BlockKey]] = defaultdict(set)  # by hash; several if schemas differ
        self._dependents: Counter[bytes] = Counter()  # by block hash: number of entries that need it
        self._policy = POLICIES[policy](budget, self._is_leaf)

    def __contains__(self, key: BlockKey) -> bool:
        return key in self.entries

    def has_room(self, size: int) -> bool:
        """Whether `size` more bytes fit the budget."""
        return self.used + size <= self.budget

    def add(self, key: BlockKey, parent: bytes, size: int) -> None:
        """Add a new key of `size` bytes. Raises ValueError if the index contains it or it does not fit."""
        if key in self.entries or not self.has_room(size):
            raise ValueError(f"the index contains {key}, or {size} bytes do not fit")
        self.entries[key] = IndexEntry(parent, size)
        self.used += size
        self.count[key.kind] += 1
        self._dependents[_required_block(key, parent)] += 1
        if key.kind == "block":
            self._blocks[key.block_hash].add(key)
        self._policy.add(key, size)

    def remove(self, key: BlockKey) -> IndexEntry | None:
        """Remove a key and return its entry; None if the index does not contain it."""
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
        """Count one use by one request of those keys that the index contains, all at the same time."""
        self._policy.touch([key for key in keys if key in self.entries])

    def next_victim(self) -> BlockKey | None:
        """The key to evict next, without removing it; None if the index is empty."""
        first = self._policy.victim()
        return first if first is not None else next(iter(self.entries), None)  # forged hashes may form a cycle

    def check_invariants(self) -> None:
        """Raise AssertionError if the index is inconsistent. Takes time linear in the number of entries."""
        sizes = sum(entry.size for entry in self.entries.values())
        hanging = Counter(_required_block(key, entry.parent) for key, entry in self.entries.items())
        blocks = {key for keys in self._blocks.values() for key in keys}
        if not (self.used == sizes <= self.budget and self._dependents == hanging):
            raise AssertionError("the index of a tier is inconsistent: bytes or dependents")
        wanted = {key for key in self.entries if key.kind == "block"}
        if blocks != wanted or sum(self.count.values()) != len(self.entries):
            raise AssertionError("the index of a tier is inconsistent: keys")

    def _is_leaf(self, key: BlockKey) -> bool:
        return key.kind == "record" or not self._dependents[key.block_hash]


def _required_block(key: BlockKey, parent: bytes) -> bytes:
    """Hash of the block that an entry depends on: its parent for a block, the block that it ends for a snapshot."""
    return parent if key.kind == "block" else key.block_hash
