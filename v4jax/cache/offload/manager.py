"""Manager of the host and disk tiers: stores KV blocks and state snapshots there and loads them back, on threads.

Store: `OffloadManager.store` queues bytes that were copied off the device. One thread computes their checksum and puts
them into the host tier; a second thread writes them to the disk tier. The queues are bounded. An item that does not fit
is dropped and counted, because a cache may lose anything.

Load: `OffloadManager.load` queues a `LoadJob` for one prefix. A reader thread reads the missing blocks and the state
snapshot, from the host tier first, and verifies every checksum.

The caller never blocks on a load. It polls `LoadJob.done`, and cancels the job when `OffloadManager.expired` reports
that the job made no progress within the deadline.

In identifiers and in the kind of a key, "record" is a state snapshot.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from v4jax.cache.offload.block_file import BlockKey, BlockSchema, checksum
from v4jax.cache.offload.disk_tier import DiskTier
from v4jax.cache.offload.host_tier import HostTier, StoredBlock

if TYPE_CHECKING:
    import jax  # for annotations only, so that importing the tiers does not import jax

_READERS = 2  # threads for loads that may read from disk
_log = logging.getLogger(__name__)
FLUSH_SECONDS = 10.0  # default limit of the time that closing waits for queued stores
ROOM = 256 << 20  # default bound, in bytes, of each of the two queues: off the device, and to disk


@dataclass(eq=False)
class LoadJob:
    """A load of one prefix from the host and disk tiers: the requested block hashes and the results so far.

    Attributes:
      block_hashes: Block hashes of the prefix, first block first, 16 bytes each.
      resident_blocks: Hashes of the blocks that are on the device and need no load.
      resident_snapshots: Hashes of the blocks whose state snapshot is on the device and needs no load.
      min_blocks: Number of prefix blocks that the request can reuse without this load. The load is worthwhile only if
        it makes more blocks available.
      num_loaded: After `done`, number of prefix blocks after which the request can resume; 0 if the load failed.
      blocks: Loaded blocks by hash. They are the blocks of the prefix that were not on the device.
      record: The loaded state snapshot at the end of block `num_loaded`, or None if it is on the device.
      done: Set when the load has ended, with or without success.
      cancelled: Set by the caller to stop the load before its next read.
      host_only: Every missing block is in the host tier, so that a slow disk cannot delay the load.
      last_progress: `time.monotonic()` in seconds at the last progress.
      failed: Keys that could not be read in this job; the job does not try them again.
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
    host_only: bool = False
    last_progress: float = field(default_factory=time.monotonic)
    failed: set[BlockKey] = field(default_factory=set)


class OffloadManager:
    """The host tier, the disk tier and the threads that move KV blocks and state snapshots between them.

    All methods but `flush` and `close` return without waiting for a transfer. The threads are daemons.
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
        """Start the threads.

        Args:
          block: Schema of a KV block.
          record: Schema of a state snapshot.
          host: The host tier, or None for no host tier.
          disk: The disk tier, or None for no disk tier.
          place: Copies a payload that was read from a file (uint8 [bytes]) into the memory that the host tier uses.
          deadline: Seconds without progress after which a load has timed out.
          room: Bytes that may be queued from the device, and also bytes that may be queued for the disk while no tier
            holds them. It is raised to two payloads of the larger schema if it is below that.
        """
        self.block, self.record, self.host, self.disk, self._place = block, record, host, disk, place
        self.deadline, self._room = deadline, max(room, 2 * max(block.nbytes, record.nbytes))
        self._lock = threading.Lock()
        self._settled = threading.Condition(self._lock)
        # Payload bytes of the items that `store` queued and that are not in a tier yet.
        self._coming: dict[BlockKey, int] = {}
        # Items queued for the disk, each with a flag that is True if the queue holds the only reference ("loose").
        self._pending: dict[BlockKey, tuple[StoredBlock, bool]] = {}
        self._loose_bytes = 0  # payload bytes of the loose items in `_pending`
        self._count = Counter(saved=0, dropped=0, fetches=0, late=0)
        self._looked = Counter()
        self._saves, self._writes, self._reads, self._quick = (queue.SimpleQueue() for _ in range(4))
        self._threads = [(self._saves, self._ingest), (self._writes, self._write), (self._quick, self._load_worker)]
        self._threads += [(self._reads, self._load_worker)] * _READERS
        for todo, work in self._threads:
            threading.Thread(target=_serve, args=(todo, work), daemon=True).start()

    @property
    def tiers(self) -> dict[str, HostTier | DiskTier]:
        """The tiers that exist, by name ("host", "disk"), the faster tier first."""
        return {name: tier for name, tier in (("host", self.host), ("disk", self.disk)) if tier is not None}

    # --- store -----------------------------------------------------------------------------------------------------

    def should_store(self, key: BlockKey) -> bool:
        """Whether a key is worth storing: no tier contains it, and it is not queued for one."""
        known = key in self._coming or key in self._pending or any(key in tier for tier in self.tiers.values())
        return not known

    def num_free(self, schema: BlockSchema) -> int:
        """Number of further payloads of a schema that fit the queue from the device now.

        The caller must pass no more than that to `store`, which does not check it.
        """
        with self._lock:
            return max(self._room - sum(self._coming.values()), 0) // schema.nbytes

    def store(self, schema: BlockSchema, block_hash: bytes, parent: bytes, payload: jax.Array | np.ndarray) -> None:
        """Queue the payload of a KV block or state snapshot for the tiers below the device.

        Args:
          schema: Schema of the payload.
          block_hash: 16 bytes; hash of the block, or of the block that the state snapshot ends.
          parent: 16 bytes; hash of the preceding block.
          payload: uint8 [schema.nbytes]. The copy off the device may still be running.
        """
        key = schema.key(block_hash)
        try:
            with self._lock:
                self._count.update(saved=1)
                self._coming[key] = schema.nbytes
            self._saves.put((schema, block_hash, parent, payload))
        except BaseException:  # after an interrupt, no thread might receive the item, and the key would stay queued
            self._arrived(key)
            raise

    def _arrived(self, key: BlockKey) -> None:
        with self._lock:
            self._coming.pop(key, None)
            self._settled.notify_all()

    def record_dropped(self, count: int) -> None:
        """Count `count` items that were not stored, because the queue was full or the copy off the device failed."""
        with self._lock:
            self._count.update(dropped=count)

    def _ingest(self, schema: BlockSchema, block_hash: bytes, parent: bytes, payload: jax.Array | np.ndarray) -> None:
        try:
            item = StoredBlock(schema, block_hash, parent, payload, checksum(np.asarray(payload)))
            self._insert(item)
        except (RuntimeError, MemoryError):  # JAX raises these if the copy off the device failed
            self.record_dropped(1)
        finally:
            self._arrived(schema.key(block_hash))

    def _insert(self, item: StoredBlock, stored: bool = False) -> None:
        """Put an item into the host tier, and queue that tier's victims for the disk.

        The item itself is queued for the disk too, unless it was read from there (`stored`).
        """
        held, gone = self.host.put(item) if self.host is not None else (False, [])
        if self.disk is None:
            return
        with self._lock:
            for other in gone:
                self._to_disk(other, loose=True)
            if not stored:
                self._to_disk(item, loose=not held)

    def _to_disk(self, item: StoredBlock, loose: bool) -> None:
        """Queue an item for the disk. The caller holds the lock.

        Args:
          item: The item. An earlier entry of the queue with the same key is replaced.
          loose: The host tier does not hold the item, so that the queue alone keeps its memory. Its bytes then count
            against `room`, and the item is dropped if they do not fit.
        """
        assert self.disk is not None
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
        if key not in self._pending:
            return False
        item, loose = self._pending.pop(key)
        self._loose_bytes -= item.schema.nbytes if loose else 0
        return True

    def _write(self, key: BlockKey) -> None:
        with self._lock:
            item, _ = self._pending.get(key, (None, False))
        if item is not None:  # None if the item was dropped from the queue in the meantime
            assert self.disk is not None  # only `_to_disk` queues items
            try:
                self.disk.put(item)
            finally:
                with self._lock:
                    self._unqueue(key)
                    self._settled.notify_all()

    def flush(self, seconds: float) -> bool:
        """Wait until every queued store is finished.

        Args:
          seconds: The longest wait in seconds.

        Returns:
          Whether the queues are empty; False if the wait timed out.
        """
        with self._lock:
            return self._settled.wait_for(lambda: not self._coming and not self._pending, seconds)

    def close(self, seconds: float = FLUSH_SECONDS) -> None:
        """Flush for at most `seconds`, tell the threads to end after their queued work, and close the tiers.

        Items that are not written to disk by then are dropped.
        """
        self.flush(seconds)
        with self._lock:
            self._pending.clear()  # another process may lock the directory after this
            self._loose_bytes = 0
        for todo, _ in self._threads:
            todo.put(None)
        for tier in self.tiers.values():
            tier.close()

    # --- load ------------------------------------------------------------------------------------------------------

    def lookup(self, names: Sequence[bytes]) -> int:
        """Number of prefix blocks after which a request can resume from the tiers alone.

        The answer comes from the indexes of the tiers; no bytes are read, so that a later load may still fail.

        Args:
          names: Block hashes of the prefix, first block first.

        Returns:
          Length of the longest prefix that the tiers contain and that ends at a state snapshot; 0 if there is none.
        """
        return self._longest_prefix(LoadJob(names, frozenset(), frozenset(), 0))

    def load(self, job: LoadJob) -> bool:
        """Start a load if it would make more than `job.min_blocks` prefix blocks available.

        A started load counts as one use of its keys for the eviction policy of every tier.

        Returns:
          Whether the load was started. If not, `job.done` is never set.
        """
        goal = self._longest_prefix(job)
        self._record_lookups(job, goal)
        if goal <= job.min_blocks:
            return False
        keys = [self.block.key(name) for name in job.block_hashes[:goal]]
        keys.append(self.record.key(job.block_hashes[goal - 1]))
        for tier in self.tiers.values():
            tier.touch(keys)
        # A load that needs only the host tier has a thread of its own, so that it never waits for a hanging disk.
        job.host_only = self.host is not None and all(key in self.host for key in keys if self._needs(job, key))
        self._count.update(fetches=1)
        (self._quick if job.host_only else self._reads).put((job,))
        return True

    def expired(self, job: LoadJob) -> bool:
        """Whether a load is still running and has made no progress within the deadline."""
        return not job.done.is_set() and time.monotonic() - job.last_progress > self.deadline

    def give_up(self, job: LoadJob) -> None:
        """Cancel a load that expired, and count it as a timeout of the disk tier unless the load is host-only."""
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
        """Length in blocks of the longest known prefix that ends at a state snapshot; 0 if there is none.

        A block or snapshot is known if it is on the device, loaded by this job, queued, or in the index of a tier.
        """
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
        """Read the missing state snapshot and blocks of the first `goal` blocks into the job.

        Returns:
          Whether everything was read. It stops at the first failure; a shorter prefix may then still be possible.
        """
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
                item = item._replace(payload=self._place(np.asarray(item.payload)))
                self._insert(item, stored=True)
        job.last_progress = time.monotonic()
        if item is None:
            job.failed.add(key)
        return item

    # --- statistics ------------------------------------------------------------------------------------------------

    def _record_lookups(self, job: LoadJob, goal: int) -> None:
        """Count the hits and misses of one request in every tier.

        A tier counts only lookups that missed in the faster tiers. The request looks up the blocks of its prefix that
        are not on the device, and the state snapshot after block `goal` (after block 1 if `goal` is 0).
        """
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
        """Counters since the start, the current queue lengths, and the statistics of every tier."""
        with self._lock:
            under_way = {"queue_saves": len(self._coming), "queue_writes": len(self._pending)}
            counts = {f"transfer_{name}": count for name, count in self._count.items()}
        looked = {
            f"{tier}_{stat}_{what}": self._looked[f"{tier}_{kind}_{what}"]
            for tier in self.tiers
            for kind, stat in (("block", "block"), ("record", "snapshot"))
            for what in ("hits", "misses")
        }
        held = {f"{name}_{what}": value for name, tier in self.tiers.items() for what, value in tier.stats().items()}
        return counts | under_way | looked | held


def _serve(todo: queue.SimpleQueue, work: Callable[..., None]) -> None:
    """Call `work` with every argument tuple of a queue until None arrives. An exception is logged, not raised."""
    while (arguments := todo.get()) is not None:
        try:
            work(*arguments)
        except Exception:
            _log.exception("the cache leaves out a block or snapshot that could not be moved")
        del arguments  # otherwise a whole prefix stays in memory while the thread waits
