"""Between the books of one device and the tiers below it: what is let go moves down, what is asked for comes up.

Down: a block that is idle, and the record behind it, are copied to the tiers when there is room on the way, at the
latest when they are evicted: their arrays are read before the next plan writes to them. Only what is idle moves: it was
computed by a request that did not fail. Up: when a request waits, the pieces of its prefix that the device lacks are
read and verified by other threads; when it can be admitted, they are put into the books and the arrays as if they had
never left, and the scheduler finds them there. A request waits for that no longer than the deadline, and reads its
prompt itself if it must.

In a run of several processes each keeps the books of all devices, and has tiers for its own. What of a prompt came up,
and whether a request still waits, the process of the request's device says, and all are told at the same step
(`Parking.agree`), so that the books of all stay equal.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import OrderedDict
from collections.abc import Mapping
from collections.abc import Sequence as Names
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from v4jax.cache.blocks import Blocks
from v4jax.cache.manifest import Form
from v4jax.cache.tiers import Item
from v4jax.cache.transfer import Fetch, Transfer
from v4jax.nn.kept import Kept
from v4jax.nn.memory import get, put
from v4jax.serve.programs import Live
from v4jax.serve.scheduler import Scheduler
from v4jax.serve.sequence import Sequence, State

_BATCH = 8  # blocks or records copied by one call, if more than one
_REMEMBERED = 1 << 20  # names of blocks


class _Save(NamedTuple):
    kind: str
    parent: bytes
    name: bytes
    number: int


class _Restore(NamedTuple):
    kind: str
    number: int
    item: Item


@dataclass(eq=False)
class Visit:
    """What is done for one request that waits. fetching: by this process. boundary: blocks that it can begin behind,
    once that is known."""

    job: Fetch
    fetching: bool
    again: bool = False  # it is the second one, after pieces were evicted meanwhile
    boundary: int | None = None


class Bay:
    """One device of an engine. `attach` joins it to the device's scheduler and books, which call it then, as `Parking`
    does.

    live: the device's state; None for a device of another process, whose books alone are kept here. forms: of a block
    and a record. second: only what a second request asked for moves down. told: `Parking.agree` says what came up.
    """

    def __init__(
        self, live: Live | None, transfer: Transfer, forms: Mapping[str, Form], *, second: bool = False,
        told: bool = False,
    ):  # fmt: skip
        self.here, self.transfer, self.forms, self._told = live is not None, transfer, forms, told
        if self.here:
            [device] = jax.tree.leaves(live)[0].devices()
            self._kinds, self._pinned = kinds(live), pinned(device)
            self._device = SingleDeviceSharding(device, memory_kind=device.default_memory().kind)
        self._moves: list[_Save | _Restore] = []  # in the order in which the books were changed
        self._backlog: dict[str, dict[bytes, _Save]] = {"block": {}, "record": {}}
        self._second, self._asked = second, OrderedDict()  # by name: whether more than one request asked for it
        self._visits: dict[Sequence, Visit | None] = {}
        self._awaited: Visit | None = None
        self._blocks: Blocks | None = None
        self.restored = 0

    def attach(self, scheduler: Scheduler) -> None:
        """Serve this scheduler and its books from now on; what was to move for others is dropped."""
        for visit in self._visits.values():
            if visit is not None:
                visit.job.cancelled = True
        scheduler.below, scheduler.blocks.watch, self._blocks = self, self.parked, scheduler.blocks
        self._moves, self._backlog, self._visits, self._awaited = [], {"block": {}, "record": {}}, {}, None

    # --- called by the books ---------------------------------------------------------------------------------------

    def parked(self, kind: str, parent: bytes, name: bytes, number: int, leaves: bool) -> None:
        """A block became idle, or a record behind an idle block ready; leaves: it is evicted now."""
        if not self.here:
            return
        save = _Save(kind, parent, name, number)
        if leaves:
            self._backlog[kind].pop(name, None)
            self._moves.append(save)
        else:
            self._backlog[kind][name] = save

    # --- called by the scheduler -----------------------------------------------------------------------------------

    def prepare(self, sequence: Sequence, names: Names[bytes]) -> None:
        """A request waits that can begin with these blocks: begin to fetch what the device lacks of them."""
        for other in [other for other in self._visits if other.state is not State.WAITING]:
            if (visit := self._visits.pop(other)) is not None:
                visit.job.cancelled = True
        if sequence not in self._visits:
            self._visits[sequence] = self._look(names)
            for name in names if self._second else ():
                self._asked[name] = name in self._asked
                self._asked.move_to_end(name)
            while len(self._asked) > _REMEMBERED:
                self._asked.popitem(last=False)

    def _look(self, names: Names[bytes], again: bool = False) -> Visit | None:
        found, _ = self._blocks.match(names)
        if found == len(names):
            return None
        here = {kind: frozenset(n for n in names if self._blocks.number(kind, n)) for kind in ("block", "record")}
        job = Fetch(tuple(names), here["block"], here["record"], found)
        fetching = self.here and self.transfer.fetch(job)
        return Visit(job, fetching, again) if fetching or self._told else None

    @property
    def unanswered(self) -> list[Visit]:
        """Of the requests that wait, in the order in which all processes met them."""
        return [visit for visit in self._visits.values() if visit is not None and visit.boundary is None]

    def answer(self, visit: Visit) -> int | None:
        """What `visit.boundary` is to be, by what was fetched here; None as long as that is not known."""
        if visit.fetching and not visit.job.done.is_set():
            return 0 if self.transfer.late(visit.job) else None
        return visit.job.boundary

    def awaits(self, sequence: Sequence, names: Names[bytes]) -> bool:
        """Whether admission is to wait; if not, what was fetched can be found now, as far as there is room for it."""
        visit, self._awaited = self._visits.get(sequence), None
        if visit is None:
            self._visits.pop(sequence, None)
            return False
        if not self._told:
            visit.boundary = self.answer(visit)
        if visit.boundary is None:
            self._awaited = visit
            return True
        if not self._bring_in(visit, sequence.seed) and not visit.again:
            self._visits[sequence] = self._look(names, again=True)
            return self.awaits(sequence, names)
        del self._visits[sequence]
        return False

    def _bring_in(self, visit: Visit, seed: bytes) -> bool:
        """Put what was fetched into the books, to be copied before the next plan; False if some of it is gone again."""
        blocks, job, names = self._blocks, visit.job, visit.job.names[: visit.boundary]
        if not names:
            return True
        lacking = [name for name in names if not blocks.number("block", name)]
        record_here = blocks.number("record", names[-1])
        # What was on the device when the fetch began was not fetched.
        if job.blocks_here & set(lacking) or (not record_here and names[-1] in job.records_here):
            return False
        record = None if record_here else blocks.keep(names[-1])
        if not record_here and record is None:
            return True  # all records are in use: no reason to try again at once
        held = blocks.acquire([name for name in names if name not in set(lacking)])
        new = blocks.allocate(len(lacking))
        if new is not None:
            pages = {**dict(zip(lacking, new, strict=True))}
            for parent, name in itertools.pairwise([seed, *names]):
                if name in pages:
                    blocks.publish(parent, name, pages[name])
                    if self.here:
                        self._moves.append(_Restore("block", pages[name], job.blocks[name]))
        if record is not None:
            self._moves += [_Restore("record", record, job.record)] if self.here and new is not None else []
            blocks.ready(names[-1], record, valid=new is not None)
        blocks.release([blocks.number("block", name) for name in names] if new is not None else held)
        self.restored += len(new or ())
        return True

    # --- called by `Parking` ----------------------------------------------------------------------------------------

    @property
    def idle(self) -> int:
        """Blocks and records that could move down."""
        return sum(map(len, self._backlog.values()))

    @property
    def moving(self) -> bool:
        """Whether `carry_out` has anything to do."""
        return bool(self._moves or self.idle)

    def carry_out(self, live: Live, idle: bool = True) -> Live:
        """The live state after all that the books changed; to be called before the next plan is sent.

        idle: nothing waits for the device, so that any number of blocks may be copied that could also wait.
        """
        moves, self._moves = self._moves, []
        for (sort, kind), run in itertools.groupby(moves, lambda move: (type(move), move.kind)):
            if sort is _Restore:
                live = self._restore(live, kind, list(run))
            else:
                self._save(live, kind, list(run))
        for kind, backlog in self._backlog.items():
            room = self.transfer.room(self.forms[kind])
            run = [backlog[name] for name in itertools.islice(backlog, room if idle else min(room, _BATCH))]
            for save in run:
                del backlog[save.name]
            self._save(live, kind, [save for save in run if self._blocks.number(kind, save.name) == save.number])
        return live

    def _save(self, live: Live, kind: str, saves: list[_Save]) -> None:
        form = self.forms[kind]
        saves = [save for save in saves if self.transfer.wants(form.key(save.name))]
        if self._second:
            saves = [save for save in saves if self._asked.get(save.name)]
        room = self.transfer.room(form)
        self.transfer.dropped(len(saves[room:]))
        for batch in _batches(saves[:room]):
            numbers = np.zeros(_BATCH if len(batch) > 1 else 1, np.int32)
            numbers[: len(batch)] = [save.number for save in batch]
            try:
                payloads = take(live, self._kinds, kind, jax.device_put(numbers, self._device))[: len(batch)]
                payloads = jax.device_put(payloads, self._pinned) if self._pinned else payloads
            except RuntimeError:  # no memory for a copy
                self.transfer.dropped(len(batch))
                continue
            for save, payload in zip(batch, payloads, strict=True):
                self.transfer.save(form, save.name, save.parent, payload)

    def _restore(self, live: Live, kind: str, restores: list[_Restore]) -> Live:
        for batch in _batches(restores):
            size = _BATCH if len(batch) > 1 else 1
            numbers = np.full(size, np.iinfo(np.int32).max, np.int32)  # what is padded goes nowhere
            numbers[: len(batch)] = [restore.number for restore in batch]
            payloads = jax.device_put([restore.item.payload for restore in batch], self._device)
            payloads += payloads[-1:] * (size - len(batch))
            live = give(live, self._kinds, kind, jax.device_put(numbers, self._device), payloads)
        return live

    def wait(self) -> bool:
        """Give the threads time if admission waits for them; whether it does."""
        if self._awaited is not None and self._awaited.fetching:
            self._awaited.job.done.wait(0.01)
        return self._awaited is not None


def pinned(device: jax.Device) -> SingleDeviceSharding | None:
    """Host memory that the device can copy to by itself; None if it has none."""
    has = "pinned_host" in {memory.kind for memory in device.addressable_memories()}
    return SingleDeviceSharding(device, memory_kind="pinned_host") if has else None


# --- programs ----------------------------------------------------------------------------------------------------


def kinds(live: Live) -> tuple[str, ...]:
    """Of every leaf: "block" if its rows are pages, "record" if they are records, "hot" if it belongs to copies."""
    parts = {"main": "block", "index": "block", "hot": "hot"}
    kind = lambda path: next((parts[name] for key in path if (name := getattr(key, "name", None)) in parts), "record")
    return tuple(kind(path) for path, _ in jax.tree_util.tree_leaves_with_path(live))


def form(live: Live, kind: str) -> Form:
    """What one block or record is made of: a row of every array that has such rows."""
    leaves = zip(jax.tree_util.tree_leaves_with_path(live), kinds(live), strict=True)
    rows = [(jax.tree_util.keystr(path), leaf) for (path, leaf), its in leaves if its == kind]
    return Form(kind, tuple((name, leaf.dtype.name, tuple(leaf.shape[1:])) for name, leaf in rows))


@functools.partial(jax.jit, static_argnums=(1, 2))
def take(live: Live, kinds: tuple[str, ...], kind: str, number_N: jax.Array) -> list[jax.Array]:
    """The bytes of so many blocks or records, each an array uint8 [bytes], so that one copy moves it."""
    count = number_N.shape[0]
    rows = [get(leaf, number_N) for leaf, its in zip(jax.tree.leaves(live), kinds, strict=True) if its == kind]
    data = jnp.concatenate([jax.lax.bitcast_convert_type(row, jnp.uint8).reshape(count, -1) for row in rows], axis=1)
    return [data[i] for i in range(count)]


@functools.partial(jax.jit, static_argnums=(1, 2), donate_argnums=0)
def give(live: Live, kinds: tuple[str, ...], kind: str, number_N: jax.Array, payloads: list[jax.Array]) -> Live:
    """The live state with such bytes in the rows number_N; numbers out of range are dropped."""
    leaves, tree = jax.tree.flatten(live)
    data, start = jnp.stack(payloads), 0
    for i, (leaf, its) in enumerate(zip(leaves, kinds, strict=True)):
        if its == kind:
            shape, width = (len(payloads), *leaf.shape[1:]), leaf.dtype.itemsize
            end = start + math.prod(leaf.shape[1:]) * width
            rows = data[:, start:end].reshape(*shape, width) if width > 1 else data[:, start:end].reshape(shape)
            new = jax.lax.bitcast_convert_type(rows, leaf.dtype)
            leaves[i] = put(leaf, new, number_N)
            start = end
    live = jax.tree.unflatten(tree, leaves)
    if kind == "record":
        return live
    return jax.tree.map(lambda kept: kept.recopied(number_N), live, is_leaf=lambda a: isinstance(a, Kept))


def _batches(things: list) -> list[list]:
    return [things[i : i + _BATCH] for i in range(0, len(things), _BATCH)]
