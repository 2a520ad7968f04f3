"""A cache over the processes of a mesh: each stores its own part of a block, and only what all have counts.

Every process keeps the same books of all of them, which change only in `sync`, that all call at the same points: so
their answers are the same in every process, and schedulers that ask nothing else stay in step. A block (or record) is

* present when every process has said that it has its part;
* leaving when one has said that it has lost it or could not store it: it is a miss at once, the others drop their
  parts, and it is freed, to be stored anew, when all have reported that;
* what `read` brings when all processes have read and verified their parts, and else a miss for all.

Blocks are known by the form of the whole, which no mesh enters. At the start a process finds the parts that earlier
meshes left in its own tiers and in `others`, directories of other processes that it can read, and what it needs is cut
from them. Where hosts see no disks but their own, another mesh finds what it has of its new part there.

An engine whose blocks are split over processes would make `part_of` its arrays once, and drive this by one `sync` a
step, before its plan (`serve.places` splits requests instead, and keeps blocks whole):

    found = shared.sync()                            # of what was asked for before; None: a miss, on every process
    if form.key(name) in shared: shared.read(form, name)           # the scheduler, when a request waits
    ... found[form.key(name)] ... unpack(part, payload, shardings) # restored on all of them, or on none
    shared.put(form, name, parent, pack(part, rows))               # a block that is idle

`put` and `read` may be called by threads of their own, like those of `cache.transfer`; `sync` waits for the slowest
process, and costs one small collective where nobody has anything to report.
"""

from __future__ import annotations

import struct
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from v4jax.cache.offload.disk_tier import Elsewhere
from v4jax.cache.offload.block_file import KINDS, BlockSchema, BlockKey, checksum
from v4jax.cache.parts import covered, recut
from v4jax.cache.offload.host_tier import StoredBlock, Tier

_HAVE, _GONE, _READ, _MISSED = range(4)  # what a process reports of a key
_REPORT = struct.Struct("<BB16s16s")


class Sharded:
    """One process' share of a cache of `count` processes, of which this is number `index`.

    tiers: its own, the fast ones first. parts: by the form of the whole, block or record, this process' part of it.
    exchange: what every process gives, by process (`parallel.distributed.gather`).
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        parts: Mapping[BlockSchema, BlockSchema],
        index: int,
        count: int,
        exchange: Callable[[bytes], Sequence[bytes]],
        others: Sequence[Elsewhere] = (),
    ):
        self.tiers, self.parts, self.index, self.count = tuple(tiers), dict(parts), index, count
        self._exchange, self._lock = exchange, threading.Lock()
        self._out: list[tuple[int, BlockKey]] = []  # reports for the next sync
        self._have: defaultdict[BlockKey, set[int]] = defaultdict(set)  # agreed: who has its part
        self._retiring: set[BlockKey] = set()  # agreed
        self._came: dict[BlockKey, np.ndarray | None] = {}  # what this process has read, until all have
        self._answers: defaultdict[BlockKey, dict[int, bool]] = defaultdict(dict)  # agreed: who has read it
        self._count = Counter(read=0, missed=0, missed_elsewhere=0)
        self._whole = {part.digest: whole for whole, part in self.parts.items()}
        self._recut: dict[BlockKey, list[tuple[Tier | Elsewhere, BlockSchema]]] = {}  # parts of other cuts that cover one's own
        self._find(others)

    def _find(self, others: Sequence[Elsewhere]) -> None:
        """Report what is there."""
        sources = [(tier, tier.watch(self._left)) for tier in self.tiers] + [(other, other.keys()) for other in others]
        forms: dict[bytes, BlockSchema | None] = {}
        strange: defaultdict[BlockKey, list] = defaultdict(list)
        for source, keys in sources:
            for key in keys:
                if key.schema in self._whole and source in self.tiers:
                    self._report(_HAVE, self._whole[key.schema].key(key.block_hash))
                    continue
                if forms.get(key.schema) is None:  # one file of each form is opened
                    forms[key.schema] = source.form(key)
                form = forms[key.schema]
                if form is not None and form.whole in self.parts:
                    strange[form.whole.key(key.block_hash)].append((source, form))
        enough: dict[tuple[BlockSchema, ...], bool] = {}
        own = {key for _, key in self._out}
        for key, found in strange.items():
            kinds = tuple(dict.fromkeys(form for _, form in found))
            if kinds not in enough:
                enough[kinds] = covered(self.parts[kinds[0].whole], kinds)
            if enough[kinds] and key not in own:
                self._recut[key] = found
                self._report(_HAVE, key)

    def _report(self, what: int, key: BlockKey) -> None:
        with self._lock:
            self._out.append((what, key))

    def _left(self, key: BlockKey) -> None:
        """A tier lets something go; called under its lock."""
        whole = self._whole.get(key.schema)
        if whole is not None and not any(key in tier for tier in self.tiers):
            self._report(_GONE, whole.key(key.block_hash))

    # --- what this process does --------------------------------------------------------------------------------------

    def __contains__(self, key: BlockKey) -> bool:
        """Whether all processes have it; key: of the whole. The same in all of them."""
        return key not in self._retiring and len(self._have.get(key, ())) == self.count

    def put(self, whole: BlockSchema, name: bytes, parent: bytes, payload: np.ndarray) -> bool:
        """Store this process' part (`parts.pack`); False if no tier takes it, or if it is still on its way out."""
        part, key = self.parts[whole], whole.key(name)
        if key in self._retiring:
            return False
        item = StoredBlock(part, name, parent, payload, checksum(payload))
        held = [tier.put(item)[0] for tier in self.tiers]
        self._report(_HAVE if any(held) else _GONE, key)
        return any(held)

    def read(self, whole: BlockSchema, name: bytes) -> None:
        """Read and verify this process' part; to be called by all, and once until `sync` has the answer."""
        key, payload = whole.key(name), self._own(whole, name)
        if key in self._came:
            raise ValueError(f"{key} is being read already")
        if payload is None and key in self._recut:
            payload = self._cut(whole, name)
        self._came[key] = payload
        self._report(_MISSED if payload is None else _READ, key)

    def _own(self, whole: BlockSchema, name: bytes) -> np.ndarray | None:
        for tier in self.tiers:
            if (item := tier.get(self.parts[whole], name)) is not None:
                return item.payload
        return None

    def _cut(self, whole: BlockSchema, name: bytes) -> np.ndarray | None:
        """This process' part, out of parts of other cuts; what is not found again will not be looked for."""
        found, part, key = {}, self.parts[whole], whole.key(name)
        for source, form in self._recut[key]:
            if form not in found and (item := source.get(form, name)) is not None:
                found[form] = item.payload
                if covered(part, found):
                    return recut(part, found.items())
        del self._recut[key]
        self._report(_GONE, key)
        return None

    def touch(self, keys: Iterable[BlockKey]) -> None:
        """One request uses these keys of the whole, as far as they are here."""
        forms = {whole.digest: part for whole, part in self.parts.items()}
        keys = [forms[key.schema].key(key.block_hash) for key in keys]
        for tier in self.tiers:
            tier.touch(keys)

    # --- what all agree on -------------------------------------------------------------------------------------------

    def sync(self) -> dict[BlockKey, np.ndarray | None]:
        """Exchange reports. By key of the whole, what all processes have read since: this one's part, verified, or
        None in all of them if one could not read its own."""
        with self._lock:
            reports, self._out = self._out, []
        data = b"".join(_REPORT.pack(what, KINDS.index(key.kind), key.block_hash, key.schema) for what, key in reports)
        for process, theirs in enumerate(self._exchange(data)):
            for what, kind, name, form in _REPORT.iter_unpack(theirs):
                self._note(process, what, BlockKey(KINDS[kind], name, form))
        answers = self._answered()
        self._let_go()
        return answers

    def _note(self, process: int, what: int, key: BlockKey) -> None:
        if what == _HAVE:
            self._have[key].add(process)
        elif what == _GONE:
            self._have[key].discard(process)
            self._retiring.add(key)
        else:
            self._answers[key][process] = what == _READ

    def _let_go(self) -> None:
        """Drop the parts of what is leaving, unless they are being read; free what nobody has any more."""
        for key in list(self._retiring):
            if not self._have[key]:
                del self._have[key]
                self._retiring.discard(key)
            elif self.index in self._have[key] and key not in self._came:
                self._drop(key)

    def _drop(self, key: BlockKey) -> None:
        whole = next(whole for whole in self.parts if whole.digest == key.schema)
        here = self.parts[whole].key(key.block_hash)
        if self._recut.pop(key, None) is not None or not any(here in tier for tier in self.tiers):
            self._report(_GONE, key)
        for tier in self.tiers:
            tier.discard(here)  # which reports it

    def _answered(self) -> dict[BlockKey, np.ndarray | None]:
        out = {}
        for key in [key for key, answers in self._answers.items() if len(answers) == self.count]:
            sound, payload = all(self._answers.pop(key).values()), self._came.pop(key)
            self._count.update(read=sound, missed=not sound, missed_elsewhere=not sound and payload is not None)
            out[key] = payload if sound else None
        return out

    # --- seen from outside -------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, float]:
        """Blocks and records that all, or not all, processes have or are to drop; counts of reads and of what went."""
        present = sum(key in self for key in self._have)
        return {
            "present": present, "incomplete": len(self._have) - present - len(self._retiring),
            "leaving": len(self._retiring), **self._count,
        }  # fmt: skip

    def check(self) -> None:
        """Raise AssertionError if what this process said that it has is not what it has; nothing may be under way."""
        part = {whole.digest: part for whole, part in self.parts.items()}
        for key, have in self._have.items():
            here = any(part[key.schema].key(key.block_hash) in tier for tier in self.tiers) or key in self._recut
            if (self.index in have) != here:
                raise AssertionError(f"the books of all processes and the tiers of this one differ in {key}")
