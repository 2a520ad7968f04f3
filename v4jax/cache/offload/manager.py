"""Moves blocks and records between the device's caller, the host tier and the disk tier, on threads of its own.

Down: `save` queues what was copied off the device; one thread sums it up and puts it on the host, another writes it to
disk. What does not fit the bounded queues is dropped and counted: it is a cache. Up: `fetch` reads the pieces of one
prefix, host first, all verified, on another thread. Nobody waits for a thread: whoever needs a fetch asks whether it is
done, and gives up when it has made no progress within the deadline.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import jax
import numpy as np

from v4jax.cache.offload.block_file import BlockKey, BlockSchema, checksum
from v4jax.cache.offload.disk_tier import DiskTier
from v4jax.cache.offload.host_tier import HostTier, StoredBlock

_READERS = 2
_log = logging.getLogger(__name__)
ROOM = 256 << 20


@dataclass(eq=False)
class LoadJob:
    """What of one chain of names is to come up, and what has come.

    blocks_here, records_here: names that are on the device. least: blocks that can be had without this. In the end,
    `boundary` blocks can be begun behind: `blocks` (by name) and `record` are what of it was not on the device.
    """

    block_hashes: Sequence[bytes]
    resident_blocks: frozenset[bytes]
    resident_snapshots: frozenset[bytes]
    min_blocks: int
    num_loaded: int = 0
    blocks: dict[bytes, StoredBlock] = field(default_factory=dict)
    record: StoredBlock | None = None
    done: threading.Event = field(default_factory=threading.Event)
    cancelled: bool = False
    host_only: bool = False  # nothing of it has to come from disk
    last_progress: float = field(default_factory=time.monotonic)  # of the last progress
    failed: set[BlockKey] = field(default_factory=set)


class OffloadManager:
    """The tiers below the device (either may be None) and the threads between them.

    block, record: their forms. place: puts bytes from a file where the host tier is to hold them. deadline: seconds
    without progress after which a fetch is late. room: bytes under way from the device, and as many on to disk.
    """

    def __init__(
        self,
        block: BlockSchema,
        record: BlockSchema,
        host: HostTier | None,
        disk: DiskTier | None,
        *,
        place: Callable[[np.ndarray], np.ndarray | jax.Array] = lambda payload: payload,
        deadline: float = 0.5,
        room: int = ROOM,
    ):
        self.block, self.record, self.host, self.disk, self._place = block, record, host, disk, place
        self.deadline, self._room = deadline, max(room, 2 * max(block.nbytes, record.nbytes))
        self._lock = threading.Lock()
        self._settled = threading.Condition(self._lock)
        self._coming: dict[BlockKey, int] = {}  # on the way from the device: bytes
        self._pending: dict[
            BlockKey, tuple[StoredBlock, bool]
        ] = {}  # to be written; whether nobody else holds the item
        self._loose_bytes = 0
        self._count = Counter(saved=0, dropped=0, fetches=0, late=0)
        self._looked = Counter()
        self._saves, self._writes, self._reads, self._quick = (queue.SimpleQueue() for _ in range(4))
        self._threads = [(self._saves, self._ingest), (self._writes, self._write), (self._quick, self._load_worker)]
        self._threads += [(self._reads, self._load_worker)] * _READERS
        for todo, work in self._threads:
            threading.Thread(target=_serve, args=(todo, work), daemon=True).start()

    @property
    def tiers(self) -> dict[str, HostTier | DiskTier]:
        """Those there are, by name, the fast one first."""
        return {name: tier for name, tier in (("host", self.host), ("disk", self.disk)) if tier is not None}

    # --- down ------------------------------------------------------------------------------------------------------

    def should_store(self, key: BlockKey) -> bool:
        """Whether saving it would be of use: no tier has it, and it is not on its way to one."""
        known = key in self._coming or key in self._pending or any(key in tier for tier in self.tiers.values())
        return not known

    def num_free(self, schema: BlockSchema) -> int:
        """How many more of a schema `store` may be given now."""
        with self._lock:
            return max(self._room - sum(self._coming.values()), 0) // schema.nbytes

    def store(self, schema: BlockSchema, block_hash: bytes, parent: bytes, payload: jax.Array | np.ndarray) -> None:
        """Send the bytes of a block or record down; they may still be on their way from the device."""
        key = schema.key(block_hash)
        try:
            with self._lock:
                self._count.update(saved=1)
                self._coming[key] = schema.nbytes
            self._saves.put((schema, block_hash, parent, payload))
        except BaseException:  # an interrupt, after which nobody might take it
            self._arrived(key)
            raise

    def _arrived(self, key: BlockKey) -> None:
        with self._lock:
            self._coming.pop(key, None)
            self._settled.notify_all()

    def record_dropped(self, count: int) -> None:
        """So many were not saved, for want of room or because the copy failed."""
        with self._lock:
            self._count.update(dropped=count)

    def _ingest(self, schema: BlockSchema, block_hash: bytes, parent: bytes, payload: jax.Array | np.ndarray) -> None:
        try:
            item = StoredBlock(schema, block_hash, parent, payload, checksum(np.asarray(payload)))
            self._insert(item)
        except (RuntimeError, MemoryError):  # what JAX raises if the copy off the device failed
            self.record_dropped(1)
        finally:
            self._arrived(schema.key(block_hash))

    def _insert(self, item: StoredBlock, stored: bool = False) -> None:
        """Put an item on the host, and what that pushes out on disk; the item itself too unless it came from there."""
        held, gone = self.host.put(item) if self.host is not None else (False, [])
        if self.disk is None:
            return
        with self._lock:
            for other in gone:
                self._to_disk(other, loose=True)
            if not stored:
                self._to_disk(item, loose=not held)

    def _to_disk(self, item: StoredBlock, loose: bool) -> None:
        """Queue a write, under the lock. loose: nobody else holds the item, so that it counts against the room."""
        key = item.key
        if key in self.disk:
            return
        queued = self._unqueue(key)
        if loose and self._loose_bytes + item.schema.nbytes > self._room:
            self._count.update(dropped=1)
            return
        self._pending[key] = item, loose
        self._loose_bytes += loose * item.schema.nbytes
        if not queued:
            self._writes.put((key,))

    def _unqueue(self, key: BlockKey) -> bool:
        item, loose = self._pending.pop(key, (None, False))
        self._loose_bytes -= item.schema.nbytes if loose else 0
        return item is not None

    def _write(self, key: BlockKey) -> None:
        with self._lock:
            item, _ = self._pending.get(key, (None, False))
        if item is not None:  # not dropped meanwhile
            try:
                self.disk.put(item)
            finally:
                with self._lock:
                    self._unqueue(key)
                    self._settled.notify_all()

    def flush(self, seconds: float) -> bool:
        """Wait until nothing is on its way down, so long at most; whether that is so."""
        with self._lock:
            return self._settled.wait_for(lambda: not self._coming and not self._pending, seconds)

    def close(self, seconds: float = 10.0) -> None:
        """Flush, end the threads as soon as they have nothing to do, and leave the tiers."""
        self.flush(seconds)
        with self._lock:
            self._pending.clear()  # the directory may be another's soon
            self._loose_bytes = 0
        for todo, _ in self._threads:
            todo.put(None)
        for tier in self.tiers.values():
            tier.close()

    # --- up --------------------------------------------------------------------------------------------------------

    def lookup(self, names: Sequence[bytes]) -> int:
        """Blocks, from the first of these on, behind which a request can begin by what is here, as far as is known."""
        return self._longest_prefix(LoadJob(names, frozenset(), frozenset(), 0))

    def load(self, job: LoadJob) -> bool:
        """Begin to fetch, if the tiers have what it takes to start behind more blocks; counts as one use of those."""
        goal = self._longest_prefix(job)
        self._record_lookups(job, goal)
        if goal <= job.min_blocks:
            return False
        keys = [self.block.key(name) for name in job.block_hashes[:goal]] + [
            self.record.key(job.block_hashes[goal - 1])
        ]
        for tier in self.tiers.values():
            tier.touch(keys)
        # What lies on the host must not wait for a disk that hangs.
        job.host_only = self.host is not None and all(key in self.host for key in keys if self._needs(job, key))
        self._count.update(fetches=1)
        (self._quick if job.host_only else self._reads).put((job,))
        return True

    def expired(self, job: LoadJob) -> bool:
        """Whether a load runs that has made no progress within the deadline."""
        return not job.done.is_set() and time.monotonic() - job.last_progress > self.deadline

    def give_up(self, job: LoadJob) -> None:
        """Cancel a load that expired, and count it against the tier that it waits for."""
        job.cancelled = True
        self._count.update(late=1)
        if self.disk is not None and not job.host_only:
            self.disk.record_timeout()

    def _load_worker(self, job: LoadJob) -> None:
        try:
            while not job.cancelled and (goal := self._longest_prefix(job)) > job.min_blocks:
                if self._load_missing(job, goal):
                    job.num_loaded = goal
                    break
        finally:
            job.done.set()

    def _longest_prefix(self, job: LoadJob) -> int:
        """Most blocks in a row, as far as is known, that end at a record."""
        best = 0
        for count, name in enumerate(job.block_hashes, 1):
            if not (name in job.resident_blocks or name in job.blocks or self._has(job, self.block.key(name))):
                break
            if name in job.resident_snapshots or self._has(job, self.record.key(name)):
                best = count
        return best

    def _needs(self, job: LoadJob, key: BlockKey) -> bool:
        return key.block_hash not in (job.resident_blocks if key.kind == "block" else job.resident_snapshots)

    def _has(self, job: LoadJob, key: BlockKey) -> bool:
        return key not in job.failed and not self.should_store(key)

    def _load_missing(self, job: LoadJob, goal: int) -> bool:
        """Read what is missing; False at the first piece that cannot be had: then there may be another goal."""
        last, job.record = job.block_hashes[goal - 1], None
        if last not in job.resident_snapshots:
            job.record = self._read(job, self.record, last)
            if job.record is None:
                return False
        for name in job.block_hashes[:goal]:
            if name not in job.resident_blocks and name not in job.blocks:
                item = None if job.cancelled else self._read(job, self.block, name)
                if item is None:
                    return False
                job.blocks[name] = item
        return True

    def _read(self, job: LoadJob, schema: BlockSchema, block_hash: bytes) -> StoredBlock | None:
        job.last_progress, key = time.monotonic(), schema.key(block_hash)
        with self._lock:
            self._settled.wait_for(lambda: key not in self._coming, self.deadline)
            item, _ = self._pending.get(key, (None, False))
        job.last_progress = time.monotonic()
        if item is not None and not item.is_intact:
            item = None
        for tier in self.tiers.values():
            if item is None and (item := tier.get(schema, block_hash)) is not None and tier is self.disk:
                item = item._replace(payload=self._place(item.payload))
                self._insert(item, stored=True)
        job.last_progress = time.monotonic()
        if item is None:
            job.failed.add(key)
        return item

    # --- seen from outside -----------------------------------------------------------------------------------------

    def _record_lookups(self, job: LoadJob, goal: int) -> None:
        """Count what a request looks up below the device: each tier is asked for what the ones above do not have."""
        asked = [("block", self.block.key(name)) for name in job.block_hashes if name not in job.resident_blocks]
        last = job.block_hashes[max(goal, 1) - 1] if job.block_hashes else None
        if last is not None and last not in job.resident_snapshots:
            asked.append(("record", self.record.key(last)))
        for name, tier in self.tiers.items():
            missed = [(kind, key) for kind, key in asked if key not in tier]
            self._looked.update(f"{name}_{kind}_misses" for kind, _ in missed)
            self._looked.update(f"{name}_{kind}_hits" for kind, key in asked if (kind, key) not in missed)
            asked = missed

    def stats(self) -> dict[str, float]:
        """Counts since the start, of what is under way, and of every tier."""
        with self._lock:
            under_way = {"queue_saves": len(self._coming), "queue_writes": len(self._pending)}
            counts = {f"transfer_{name}": count for name, count in self._count.items()}
        looked = {
            f"{tier}_{kind}_{what}": self._looked[f"{tier}_{kind}_{what}"]
            for tier in self.tiers
            for kind in ("block", "record")
            for what in ("hits", "misses")
        }
        held = {f"{name}_{what}": value for name, tier in self.tiers.items() for what, value in tier.stats().items()}
        return counts | under_way | looked | held


def _serve(todo: queue.SimpleQueue, work: Callable[..., None]) -> None:
    while (arguments := todo.get()) is not None:
        try:
            work(*arguments)
        except Exception:
            _log.exception("the cache leaves out a block or record that could not be moved")
        del arguments  # it may hold a whole prefix
