"""Block pool of the paged KV cache: reference counts, prefix-cache lookup and eviction of blocks and state snapshots.

A *block* holds the entries and index keys of `block_size` tokens in all layers. A *state snapshot* is a copy of a state
slot (window rings and compressor state) at a block boundary, from which another sequence can resume. The pool runs on
the host and handles only their numbers: block ids, and the ids of the state slots that are set aside for snapshots.
Block 0 is reserved and never allocated.

A block hash (`block_hash.block_hashes`) identifies the content of a block. A block is *findable* if a lookup of its
hash returns it. Each block is in one of three states:

* free;
* in use, i.e. referenced by the sequence that computed it or by sequences that found it under its hash;
* idle, i.e. findable and referenced by no sequence, until it is evicted to make room.

Idle blocks are evicted in order of least recent use, and a parent block is never evicted before an idle child. No extra
bookkeeping is needed for the second rule, because the blocks of a sequence are released last block first, and a
released duplicate also renews the block that owns its hash. A request counts as one use of its blocks, however many
tokens it decodes.

A hash belongs to one block. A sequence that computes a block whose hash is already findable keeps its own block, a
*duplicate*, so its block table never changes under it. When the duplicate is released, it is freed, or it takes over
the hash if the other block was evicted in the meantime.

A snapshot is found under the hash of the block at whose end it was taken. It is pinned while a copy into it or out of
it may be in flight. A pinned snapshot is neither reused nor evicted. Dropping a pinned snapshot only makes it
unfindable; its slot is freed by the last unpin.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence


class BlockPool:
    """Pool of the blocks 1 to pages - 1 and of the given snapshot slots.

    No method raises for lack of room. `allocate` and `reserve_snapshot` then return None and change nothing. ValueError
    means that the caller misused the pool, for example by releasing a block twice.

    Args:
      pages: number of blocks, including the reserved block 0.
      records: ids of the state slots that hold snapshots.
      remember: number of block hashes that are remembered to compute "hit_ceiling" (see `stats`).

    Attributes:
      capacity: number of blocks that can be allocated, pages - 1.
      on_idle: callback(kind, parent, name, number, leaves), None without offload. It is called when a findable block
        becomes idle, when a snapshot of an idle block is ready, and (leaves=True) just before either is evicted. `kind`
        is "block" or "record" (a snapshot), `parent` the hash of the preceding block, `name` the hash of the block,
        `number` the block id or the slot id of the snapshot.

    Raises:
      ValueError: `pages` is less than 2.
    """

    def __init__(self, pages: int, records: Iterable[int] = (), *, remember: int = 1 << 20):
        if pages < 2:
            raise ValueError(f"{pages} pages leave none to give out: page 0 is reserved")
        self.capacity = pages - 1
        self._records = tuple(records)
        self.reset()
        self._ever_seen: OrderedDict[bytes, None] = OrderedDict()
        self._remember = remember
        self._count = Counter(queries=0, hits=0, repeated=0, num_block_evictions=0, num_snapshot_evictions=0)
        # Arguments: kind, parent hash, block hash, block or slot id, whether it is being evicted.
        self.on_idle: Callable[[str, bytes, bytes, int, bool], None] | None = None

    def reset(self) -> None:
        """Free all blocks and snapshots and forget all hashes. The counters and "hit_ceiling" keep their history."""
        self._references = [0] * (self.capacity + 1)
        self._free = list(range(self.capacity, 0, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._page: dict[bytes, int] = {}  # block hash -> findable block
        self._name: dict[int, tuple[bytes, bytes]] = {}  # block -> (parent hash, block hash), duplicates included
        self._invalid: set[int] = set()  # blocks in use that must not become findable (again)
        self._free_slots = list(reversed(self._records))
        self._record: OrderedDict[bytes, int] = OrderedDict()  # block hash -> snapshot slot, least recently used first
        self._pins: Counter[int] = Counter()  # snapshot slot -> copies in flight
        self._uncommitted: set[bytes] = set()  # hashes whose snapshot is reserved but not yet written
        self._resumed: set[bytes] = set()  # hashes from whose snapshot a sequence has resumed

    # --- lookup ----------------------------------------------------------------------------------------------------

    def match_prefix(self, names: Sequence[bytes]) -> tuple[int, int | None]:
        """Find the longest cached prefix that a sequence can resume after. Changes nothing.

        A prefix of blocks is usable only if a committed snapshot exists at its end, because the window rings and the
        compressor state must be at the same token as the entries.

        Args:
          names: block hashes of the sequence, from its first block on.

        Returns:
          (number of prefix blocks, snapshot slot at their end), or (0, None) if there is no usable prefix.
        """
        best = 0, None
        for count, name in enumerate(names, 1):
            if name not in self._page:
                break
            if name in self._record and name not in self._uncommitted:
                best = count, self._record[name]
        return best

    def lookup(self, kind: str, name: bytes) -> int | None:
        """Return the block (kind "block") or the committed snapshot (kind "record") of a block hash, else None."""
        if kind == "record" and name in self._uncommitted:
            return None
        return (self._page if kind == "block" else self._record).get(name)

    def num_available(self, names: Sequence[bytes] = ()) -> int:
        """Return the number of blocks that `allocate` could give after `touch(names)`.

        Args:
          names: block hashes, all of them findable. Their idle blocks do not count, because `touch` takes them.
        """
        return len(self._free) + len(self._idle) - sum(self._page[name] in self._idle for name in names)

    def touch(self, names: Sequence[bytes]) -> list[int]:
        """Add a reference to the findable block of each hash, so that it cannot be evicted.

        Returns:
          The block ids, in the order of `names`.

        Raises:
          KeyError: a hash has no findable block. No reference is added then.
        """
        pages = [self._page[name] for name in names]
        for page in pages:
            self._references[page] += 1
            self._idle.pop(page, None)
        return pages

    def note(self, names: Sequence[bytes], hits: int) -> None:
        """Count a request's prefix lookup in the hit statistics.

        Args:
          names: block hashes that the request looked up.
          hits: number of leading blocks that the request reused.
        """
        repeated = sum(i < hits or name in self._ever_seen for i, name in enumerate(names))
        self._count.update(queries=len(names), hits=hits, repeated=repeated)
        self._ever_seen.update(dict.fromkeys(names))
        while len(self._ever_seen) > self._remember:
            self._ever_seen.popitem(last=False)

    # --- blocks ----------------------------------------------------------------------------------------------------

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` blocks with one reference each and evict idle blocks as needed; None if too few are left."""
        if count > self.num_available():
            return None
        while len(self._free) < count:
            self._evict()
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def cache_block(self, parent: bytes, name: bytes, page: int) -> bool:
        """Make a block in use findable under its hash.

        Args:
          parent: hash of the preceding block, or the hash seed for a first block.
          name: hash of the block.
          page: block id.

        Returns:
          True if the block is findable now. False if another block has the hash; `page` is then a duplicate.

        Raises:
          ValueError: the block is not in use, was invalidated or has another hash.
        """
        if not self._references[page] or page in self._invalid or self._name.get(page, (parent, name))[1] != name:
            raise ValueError(f"page {page} is not in use, was retracted or has another name")
        self._name[page] = (parent, name)
        return self._page.setdefault(name, page) == page

    def free(self, pages: Sequence[int]) -> None:
        """Drop one reference to each block. A block without references becomes idle if it is findable, else free.

        Args:
          pages: block ids of one sequence, in the order of its tokens. They are released last block first.

        Raises:
          ValueError: a block is not in use, or is given more often than it is referenced. Nothing is released then.
        """
        if any(self._references[page] < times for page, times in Counter(pages).items()):
            raise ValueError(f"pages {list(pages)} hold one that is not in use")
        for page in reversed(pages):
            self._references[page] -= 1
            if not self._references[page]:
                self._retire(page)

    def invalidate(self, pages: Iterable[int]) -> None:
        """Make blocks in use unfindable for good, because the computation that filled them failed.

        The snapshot at the end of a block is dropped too if the block was the one found under its hash.
        """
        for page in pages:
            self._invalid.add(page)
            _, name = self._name.get(page, (None, None))
            if name is not None and self._page.get(name) == page:
                del self._page[name]
                self.drop_snapshot(name)

    def _retire(self, page: int) -> None:
        """Make a block that lost its last reference idle if it is findable or can take over its hash, else free."""
        _, name = self._name.get(page, (None, None))
        distrusted = page in self._invalid
        if name is not None and not distrusted and self._page.setdefault(name, page) == page:
            self._idle[page] = None
            self._notify("record", name, False)
            self._notify("block", name, False)
            return
        if name is not None and self._page.get(name) in self._idle:
            self._idle.move_to_end(self._page[name])  # a child may just have become idle
        self._name.pop(page, None)
        self._invalid.discard(page)
        self._free.append(page)

    def _evict(self) -> None:
        """Evict the least recently used idle block and the snapshot at its end."""
        page = next(iter(self._idle))
        _, name = self._name[page]
        self._notify("record", name, True)
        self._notify("block", name, True)
        del self._idle[page], self._name[page], self._page[name]
        self.drop_snapshot(name)  # no lookup can reach it without its block
        self._free.append(page)
        self._count["num_block_evictions"] += 1

    def _notify(self, kind: str, name: bytes, leaves: bool) -> None:
        """Call `on_idle` if the block of the hash is idle and there is such a block or committed snapshot."""
        if self.on_idle is not None and (page := self._page.get(name)) in self._idle:
            if (number := self.lookup(kind, name)) is not None:
                self.on_idle(kind, self._name[page][0], name, number, leaves)

    # --- snapshots -------------------------------------------------------------------------------------------------

    def reserve_snapshot(self, name: bytes) -> int | None:
        """Reserve a snapshot slot for the end of a block. It is pinned, and not findable before `commit_snapshot`.

        If no slot is free, the least recently used unpinned snapshot is evicted.

        Args:
          name: hash of the block at whose end the snapshot is taken.

        Returns:
          The slot to copy into. None if the hash has a snapshot already or all slots are pinned.
        """
        if name in self._record:
            return None
        if not self._free_slots:
            old = next((old for old, record in self._record.items() if not self._pins[record]), None)
            if old is None:
                return None
            self._notify("record", old, True)
            self.drop_snapshot(old)
            self._count["num_snapshot_evictions"] += 1
        record = self._free_slots.pop()
        self._record[name] = record
        self._uncommitted.add(name)
        self._pins[record] += 1
        return record

    def commit_snapshot(self, name: bytes, record: int, *, valid: bool = True) -> None:
        """Unpin a snapshot whose copy is done, and make it findable unless it is invalid or has been dropped.

        Args:
          name: block hash that was given to `reserve_snapshot`.
          record: slot that `reserve_snapshot` returned.
          valid: False if the copied state must not be used; the snapshot is then dropped.
        """
        if self._record.get(name) == record:
            self._uncommitted.discard(name)
            if not valid:
                self.drop_snapshot(name)
            self._notify("record", name, False)
        self.unpin(record)

    def pin(self, name: bytes) -> int:
        """Pin the snapshot of a block hash for a copy out of it. This counts as a use.

        Returns:
          The snapshot slot.

        Raises:
          KeyError: the hash has no snapshot.
        """
        record = self._record[name]
        self._record.move_to_end(name)
        self._resumed.add(name)
        self._pins[record] += 1
        return record

    def unpin(self, record: int) -> None:
        """Remove one pin after a copy is done. The last unpin of a dropped snapshot frees its slot.

        Raises:
          ValueError: the slot is not pinned.
        """
        if not self._pins[record]:
            raise ValueError(f"record {record} is not pinned")
        self._pins[record] -= 1
        if not self._pins[record] and record not in self._record.values():
            self._free_slots.append(record)

    def drop_snapshot(self, name: bytes, *, unless_used: bool = False) -> None:
        """Drop the snapshot of a block hash, if there is one. A pinned slot is freed only by its last unpin.

        Args:
          name: block hash.
          unless_used: keep the snapshot if a sequence has resumed from it.
        """
        if name not in self._record or (unless_used and name in self._resumed):
            return
        record = self._record.pop(name)
        self._uncommitted.discard(name)
        self._resumed.discard(name)
        if not self._pins[record]:
            self._free_slots.append(record)

    # --- statistics and checks -------------------------------------------------------------------------------------

    def stats(self) -> dict[str, float]:
        """Return the state of the pool and its counters.

        Returns:
          num_blocks_free, num_blocks_cached (idle), num_blocks_in_use: current number of blocks in each state.
          num_snapshots_free, num_snapshots_cached: current number of free snapshot slots and of findable or reserved
            snapshots.
          queries, hits, repeated: blocks since the start that requests looked up, that they reused, and that they
            reused or had looked up before.
          num_block_evictions, num_snapshot_evictions: blocks evicted since the start, and snapshots evicted to make
            room for others.
          hit_rate: hits / queries.
          hit_ceiling: repeated / queries, the hit rate of an unlimited cache. It is an underestimate if more than
            `remember` hashes were looked up.
        """
        queries = max(self._count["queries"], 1)
        return {
            "num_blocks_free": len(self._free),
            "num_blocks_cached": len(self._idle),
            "num_blocks_in_use": self.capacity - len(self._free) - len(self._idle),
            "num_snapshots_free": len(self._free_slots),
            "num_snapshots_cached": len(self._record),
            **self._count,
            "hit_rate": self._count["hits"] / queries,
            "hit_ceiling": self._count["repeated"] / queries,
        }

    def contents(self) -> tuple[dict[bytes, int], dict[bytes, int]]:
        """Return what the pool holds, as copies.

        Returns:
          (findable block of each block hash, snapshot slot of each block hash). The snapshots include those that are
          reserved but not committed, and are in order of least recent use.
        """
        return dict(self._page), dict(self._record)

    def check_invariants(self, owners: Iterable[Sequence[int]] | None = None) -> None:
        """Check the consistency of the pool, in time linear in the number of blocks.

        Args:
          owners: block ids of every sequence. If given, the reference counts must equal the uses in them.

        Raises:
          AssertionError: an invariant does not hold.
        """
        self._check_pages()
        self._check_order()
        self._check_records()
        if owners is not None:
            held = Counter(page for pages in owners for page in pages)
            _require(
                all(self._references[p] == held[p] for p in range(self.capacity + 1)), "references are the owners'"
            )

    def _check_pages(self) -> None:
        """Check the states of the blocks and the map of hashes."""
        used = [page for page, references in enumerate(self._references) if references]
        _require(min(self._references) >= 0, "no negative references")
        _require(
            sorted([*self._free, *self._idle, *used]) == list(range(1, self.capacity + 1)),
            "every page is free, idle or in use, and only one of these",
        )
        _require(not set(self._free) & (set(self._name) | self._invalid), "free pages have no names and no marks")
        _require(
            all(self._name[page][1] == name for name, page in self._page.items()), "findable pages know their name"
        )
        _require(all(self._page.get(self._name[page][1]) == page for page in self._idle), "idle pages can be found")
        _require(not self._invalid & {*self._page.values()}, "retracted pages cannot be found")

    def _check_order(self) -> None:
        """Check that no idle block is evicted before an idle child."""
        place = {page: i for i, page in enumerate(self._idle)}
        for page, i in place.items():
            parent = self._page.get(self._name[page][0])
            _require(
                parent is None or place.get(parent, i + 1) > i, "idle parents are evicted after their idle children"
            )

    def _check_records(self) -> None:
        """Check the states of the snapshot slots."""
        kept = list(self._record.values())
        pinned = {record for record, pins in self._pins.items() if pins}
        hidden = pinned - set(kept)
        _require(
            sorted([*self._free_slots, *kept, *hidden]) == sorted(self._records),
            "every record is spare, kept or hidden while pinned, and only one of these",
        )
        _require(min(self._pins.values(), default=0) >= 0, "no negative pins")
        _require(self._uncommitted | self._resumed <= set(self._record), "marks are of kept records")
        _require(all(self._record[name] in pinned for name in self._uncommitted), "records to be written are pinned")


def _require(condition: bool, rule: str) -> None:
    """Raise AssertionError, naming `rule`, if `condition` is false."""
    if not condition:
        raise AssertionError(f"the state of the cache is inconsistent; the rule: {rule}")
