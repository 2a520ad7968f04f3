"""Who owns which page and which kept record: the host's books of the paged cache.

A *page* holds what one block of tokens leaves in every layer; page 0 is never given out. A *record* holds what else is
needed to go on behind a block. Both are only numbers here. A page is

* free;
* in use: referenced by one sequence, or by several that found it under its name (`prefix.chain`);
* idle: findable and referenced by nobody, until it is evicted to make room.

Idle pages are evicted by least recent use, and a parent never before an idle child of its: the pages of a sequence
are released last block first, and a release renews the parents that others own, so use alone gives this order. A
request counts as one use of its blocks, however many tokens it decodes.

A name belongs to one page. A sequence that computes a block which is already findable keeps its own page, a
*duplicate*: its table never changes under it. The duplicate is freed with the sequence, or takes the name over if the
other page was evicted meanwhile.

A kept record is found under the name of the block that it stands behind. It is pinned while a copy into it or out of
it may be under way, and then neither given to others nor evicted; forgetting a pinned record only hides it.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence


class BlockPool:
    """Pages 1 to pages - 1, and the records whose numbers are given.

    remember: how many names the hit-rate ceiling remembers. Nothing here raises for lack of room (None is returned,
    and nothing has changed); ValueError means that the caller broke the rules, as in releasing a page twice.
    """

    def __init__(self, pages: int, records: Iterable[int] = (), *, remember: int = 1 << 20):
        if pages < 2:
            raise ValueError(f"{pages} pages leave none to give out: page 0 is reserved")
        self.capacity = pages - 1
        self._records = tuple(records)
        self.reset()
        self._ever_seen: OrderedDict[bytes, None] = OrderedDict()
        self._remember = remember
        self._count = Counter(queries=0, hits=0, repeated=0, evictions=0, record_evictions=0)
        # Told (kind, parent, name, number, whether it is evicted now) of idle blocks and of ready records behind them.
        self.on_idle: Callable[[str, bytes, bytes, int, bool], None] | None = None

    def reset(self) -> None:
        """Free every page and record and forget every name; counts, and what the hit-rate ceiling remembers, stay."""
        self._references = [0] * (self.capacity + 1)
        self._free = list(range(self.capacity, 0, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # next to be evicted first
        self._page: dict[bytes, int] = {}
        self._name: dict[int, tuple[bytes, bytes]] = {}  # page: (parent, name), also of pages that are not findable
        self._invalid: set[int] = set()  # pages in use that must not become findable (again)
        self._free_slots = list(reversed(self._records))
        self._record: OrderedDict[bytes, int] = OrderedDict()  # next to be evicted first
        self._pins: Counter[int] = Counter()
        self._uncommitted: set[bytes] = set()  # names of records that are still to be written
        self._resumed: set[bytes] = set()  # names of records that somebody has resumed from

    # --- finding ---------------------------------------------------------------------------------------------------

    def match_prefix(self, names: Sequence[bytes]) -> tuple[int, int | None]:
        """(blocks to start behind, the record that stands there), or (0, None). Changes nothing.

        The longest run of findable pages from the first name on that ends at a ready record: no group of the cache may
        be behind another.
        """
        best = 0, None
        for count, name in enumerate(names, 1):
            if name not in self._page:
                break
            if name in self._record and name not in self._uncommitted:
                best = count, self._record[name]
        return best

    def lookup(self, kind: str, name: bytes) -> int | None:
        """The page (kind "block") or the ready record (kind "record") of a name; None if it cannot be found."""
        if kind == "record" and name in self._uncommitted:
            return None
        return (self._page if kind == "block" else self._record).get(name)

    def num_available(self, names: Sequence[bytes] = ()) -> int:
        """Pages that `allocate` could give once the pages of `names` were acquired."""
        return len(self._free) + len(self._idle) - sum(self._page[name] in self._idle for name in names)

    def touch(self, names: Sequence[bytes]) -> list[int]:
        """Reference the findable pages of these names. Raises KeyError, before anything changes, for an unknown one."""
        pages = [self._page[name] for name in names]
        for page in pages:
            self._references[page] += 1
            self._idle.pop(page, None)
        return pages

    def note(self, names: Sequence[bytes], hits: int) -> None:
        """Count a request's look-up of `names`, of which the first `hits` were used."""
        repeated = sum(i < hits or name in self._ever_seen for i, name in enumerate(names))
        self._count.update(queries=len(names), hits=hits, repeated=repeated)
        self._ever_seen.update(dict.fromkeys(names))
        while len(self._ever_seen) > self._remember:
            self._ever_seen.popitem(last=False)

    # --- pages -----------------------------------------------------------------------------------------------------

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages with one reference each, evicting as needed, or None if there are too few."""
        if count > self.num_available():
            return None
        while len(self._free) < count:
            self._evict()
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def cache_block(self, parent: bytes, name: bytes, page: int) -> bool:
        """Make a page in use findable; False if another has the name, and `page` stays its owner's duplicate."""
        if not self._references[page] or page in self._invalid or self._name.get(page, (parent, name))[1] != name:
            raise ValueError(f"page {page} is not in use, was retracted or has another name")
        self._name[page] = (parent, name)
        return self._page.setdefault(name, page) == page

    def free(self, pages: Sequence[int]) -> None:
        """Drop one reference of each page, which are a sequence's in the order of its blocks."""
        if any(self._references[page] < times for page, times in Counter(pages).items()):
            raise ValueError(f"pages {list(pages)} hold one that is not in use")
        for page in reversed(pages):
            self._references[page] -= 1
            if not self._references[page]:
                self._retire(page)

    def invalidate(self, pages: Iterable[int]) -> None:
        """Make pages in use unfindable for good, with the records behind them: what computed them went wrong."""
        for page in pages:
            self._invalid.add(page)
            _, name = self._name.get(page, (None, None))
            if self._page.get(name) == page:
                del self._page[name]
                self.drop_snapshot(name)

    def _retire(self, page: int) -> None:
        """A page that lost its last reference becomes idle if it can be found, else free."""
        _, name = self._name.get(page, (None, None))
        distrusted = page in self._invalid
        if name is not None and not distrusted and self._page.setdefault(name, page) == page:
            self._idle[page] = None
            self._notify("record", name, False)
            self._notify("block", name, False)
            return
        if self._page.get(name) in self._idle:
            self._idle.move_to_end(self._page[name])  # its child may just have become idle
        self._name.pop(page, None)
        self._invalid.discard(page)
        self._free.append(page)

    def _evict(self) -> None:
        page = next(iter(self._idle))
        _, name = self._name[page]
        self._notify("record", name, True)
        self._notify("block", name, True)
        del self._idle[page], self._name[page], self._page[name]
        self.drop_snapshot(name)  # unreachable now
        self._free.append(page)
        self._count["evictions"] += 1

    def _notify(self, kind: str, name: bytes, leaves: bool) -> None:
        if self.on_idle is not None and (page := self._page.get(name)) in self._idle:
            if (number := self.lookup(kind, name)) is not None:
                self.on_idle(kind, self._name[page][0], name, number, leaves)

    # --- records ---------------------------------------------------------------------------------------------------

    def reserve_snapshot(self, name: bytes) -> int | None:
        """A pinned record to copy into, not found before `ready`; None if there is one already or none can be had."""
        if name in self._record:
            return None
        if not self._free_slots:
            old = next((old for old, record in self._record.items() if not self._pins[record]), None)
            if old is None:
                return None
            self._notify("record", old, True)
            self.drop_snapshot(old)
            self._count["record_evictions"] += 1
        record = self._free_slots.pop()
        self._record[name] = record
        self._uncommitted.add(name)
        self._pins[record] += 1
        return record

    def commit_snapshot(self, name: bytes, record: int, *, valid: bool = True) -> None:
        """The copy into `record` is done: let it be found if it is valid and was not forgotten meanwhile."""
        if self._record.get(name) == record:
            self._uncommitted.discard(name)
            if not valid:
                self.drop_snapshot(name)
            self._notify("record", name, False)
        self.unpin(record)

    def pin(self, name: bytes) -> int:
        """The record of a name, for a copy out of it; counts as use. Raises KeyError if there is none."""
        record = self._record[name]
        self._record.move_to_end(name)
        self._resumed.add(name)
        self._pins[record] += 1
        return record

    def unpin(self, record: int) -> None:
        """The copy is done."""
        if not self._pins[record]:
            raise ValueError(f"record {record} is not pinned")
        self._pins[record] -= 1
        if not self._pins[record] and record not in self._record.values():
            self._free_slots.append(record)

    def drop_snapshot(self, name: bytes, *, unless_used: bool = False) -> None:
        """Let a record go, if there is one; unless_used: not if somebody has resumed from it."""
        if name not in self._record or (unless_used and name in self._resumed):
            return
        record = self._record.pop(name)
        self._uncommitted.discard(name)
        self._resumed.discard(name)
        if not self._pins[record]:
            self._free_slots.append(record)

    # --- seen from outside -----------------------------------------------------------------------------------------

    def stats(self) -> dict[str, float]:
        """Counts of pages and records now, of blocks since the start; hit_ceiling is what no cache could exceed."""
        queries = max(self._count["queries"], 1)
        return {
            "pages_free": len(self._free),
            "pages_cached": len(self._idle),
            "pages_in_use": self.capacity - len(self._free) - len(self._idle),
            "records_spare": len(self._free_slots),
            "records_kept": len(self._record),
            **self._count,
            "hit_rate": self._count["hits"] / queries,
            "hit_ceiling": self._count["repeated"] / queries,
        }

    def check_invariants(self, owners: Iterable[Sequence[int]] | None = None) -> None:
        """Raise AssertionError if the books do not add up, in time linear in the pages.

        owners: the pages of everyone who holds some; then the references must be exactly theirs.
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
        place = {page: i for i, page in enumerate(self._idle)}
        for page, i in place.items():
            parent = self._page.get(self._name[page][0])
            _require(place.get(parent, i + 1) > i, "idle parents are evicted after their idle children")

    def _check_records(self) -> None:
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
    if not condition:
        raise AssertionError(f"the books of the cache are wrong; the rule: {rule}")
