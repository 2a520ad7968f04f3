"""Copies blocks and state snapshots (kind "record") between one device and the offload tiers.

Store: an idle block and the snapshot behind it are copied to the tiers when the queue has room, at the latest when they
are evicted; their arrays are read before the next plan overwrites them. Only idle blocks are stored, because they were
computed by requests that did not fail. Load: other threads read and verify the prefix blocks that a waiting request
lacks on the device. When the request can be admitted, the blocks enter the block pool and the arrays, and the scheduler
finds them as cached. A load without progress within the deadline is abandoned, and the request prefills its prompt.

With several processes, each has the block pools of all devices, and tiers for its own devices. The process that owns a
request's device decides whether its load is done and what it loaded. All processes learn that at the same step
(`OffloadConnector.sync_loads`), so their block pools stay equal.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from v4jax.cache.block_pool import BlockPool
from v4jax.cache.offload.block_file import BlockSchema
from v4jax.cache.offload.host_tier import StoredBlock
from v4jax.cache.offload.manager import LoadJob, OffloadManager
from v4jax.cache.paged_cache import PagedLayerCache
from v4jax.parallel.host_memory import host_gather, host_scatter
from v4jax.serve.model_steps import KVCaches
from v4jax.serve.request import Request, RequestStatus

_BATCH = 8  # blocks or snapshots per copy program, if more than one
_REMEMBERED = 1 << 20  # block hashes whose look-ups are remembered


class StoreOp(NamedTuple):
    kind: str
    parent: bytes
    name: bytes
    number: int


class LoadOp(NamedTuple):
    kind: str
    number: int
    item: StoredBlock


@dataclass(eq=False)
class PendingLoad:
    """Outstanding prefix load of one waiting request. fetching: this process issued the load. num_loaded: number of
    prefix blocks available once the load is decided, else None."""

    job: LoadJob
    fetching: bool
    again: bool = False  # the second load, after blocks were evicted during the first
    num_loaded: int | None = None


class DeviceKVConnector:
    """The `KVConnector` of one device.

    Args:
        caches: KV caches of the device; None for a device of another process, of which this process has only the pool.
        transfer: the offload tiers of this process.
        schemas: schemas of the kinds "block" and "record".
        second_use: store only blocks that a second request looked up.
        synced: `OffloadConnector.sync_loads` sets the result of each load (several processes).
    """

    def __init__(
        self,
        caches: KVCaches | None,
        transfer: OffloadManager,
        schemas: Mapping[str, BlockSchema],
        *,
        second_use: bool = False,
        synced: bool = False,
    ):
        self.is_local, self.transfer, self.schemas, self._synced = caches is not None, transfer, schemas, synced
        if caches is not None:
            [device] = jax.tree.leaves(caches)[0].devices()
            self._kinds, self._pinned = leaf_kinds(caches), pinned_sharding(device)
            self._device = SingleDeviceSharding(device, memory_kind=device.default_memory().kind)
        self._transfers: list[StoreOp | LoadOp] = []  # in the order of the block pool's changes
        self._backlog: dict[str, dict[bytes, StoreOp]] = {"block": {}, "record": {}}
        self._second_use = second_use
        self._lookups: OrderedDict[bytes, bool] = OrderedDict()  # whether more than one request looked up the block
        self._loads: dict[Request, PendingLoad | None] = {}
        self._blocks: BlockPool  # `bind` sets it, before any request
        self.num_restored = 0

    def bind(self, block_pool: BlockPool) -> None:
        """See KVConnector."""
        for load in self._loads.values():
            if load is not None:
                load.job.cancelled = True
        self._blocks, block_pool.on_idle = block_pool, self.on_block_idle
        self._transfers, self._backlog, self._loads = [], {"block": {}, "record": {}}, {}

    # --- called by the block pool ----------------------------------------------------------------------------------

    def on_block_idle(self, kind: str, parent: bytes, name: bytes, number: int, leaves: bool) -> None:
        """Note an idle block, or a committed snapshot behind one. leaves: it is evicted now, so copy it at once."""
        if not self.is_local:
            return
        op = StoreOp(kind, parent, name, number)
        if leaves:
            self._backlog[kind].pop(name, None)
            self._transfers.append(op)
        else:
            self._backlog[kind][name] = op

    # --- called by the scheduler -----------------------------------------------------------------------------------

    def prefetch(self, request: Request, names: Sequence[bytes]) -> None:
        """See KVConnector."""
        for other in [other for other in self._loads if other.status is not RequestStatus.WAITING]:
            if (load := self._loads.pop(other)) is not None:
                load.job.cancelled = True
        if request not in self._loads:
            self._loads[request] = self._start_load(names)
            for name in names if self._second_use else ():
                self._lookups[name] = name in self._lookups
                self._lookups.move_to_end(name)
            while len(self._lookups) > _REMEMBERED:
                self._lookups.popitem(last=False)

    def _start_load(self, names: Sequence[bytes], again: bool = False) -> PendingLoad | None:
        found, _ = self._blocks.match_prefix(names)
        if found == len(names):
            return None
        resident = {kind: frozenset(n for n in names if self._blocks.lookup(kind, n)) for kind in ("block", "record")}
        job = LoadJob(tuple(names), resident["block"], resident["record"], found)
        fetching = self.is_local and self.transfer.load(job)
        return PendingLoad(job, fetching, again) if fetching or self._synced else None

    @property
    def pending(self) -> list[PendingLoad]:
        """Undecided loads of waiting requests, in the order of `prefetch`, which is the same in all processes."""
        return [load for load in self._loads.values() if load is not None and load.num_loaded is None]

    def poll(self, load: PendingLoad) -> int | None:
        """Return the number of prefix blocks available after a load by this process; None while the load runs.

        An expired load is abandoned and gives 0.
        """
        return None if self._runs(load) else self._result(load)

    def _runs(self, load: PendingLoad) -> bool:
        return load.fetching and not load.job.done.is_set() and not self.transfer.expired(load.job)

    def _result(self, load: PendingLoad) -> int:
        if not load.fetching or load.job.done.is_set():
            return load.job.num_loaded
        self.transfer.give_up(load.job)
        return 0

    def is_loading(self, request: Request) -> bool:
        """See KVConnector."""
        load = self._loads.get(request)
        return load is not None and (load.num_loaded is None if self._synced else self._runs(load))

    def finish_load(self, request: Request, names: Sequence[bytes]) -> bool:
        """See KVConnector."""
        load = self._loads.pop(request, None)
        if load is None:
            return True
        if not self._synced:
            load.num_loaded = self._result(load)
        assert request.hash_seed is not None  # a request that was prefetched has block hashes
        if self._install(load, request.hash_seed) or load.again:
            return True
        retry = self._start_load(names, again=True)
        if retry is not None:
            self._loads[request] = retry
        return retry is None

    def _install(self, load: PendingLoad, seed: bytes) -> bool:
        """Enter loaded blocks into the pool; False if blocks that were on the device at the start were evicted."""
        blocks, job, names = self._blocks, load.job, load.job.block_hashes[: load.num_loaded]
        if not names:
            return True
        lacking = [name for name in names if not blocks.lookup("block", name)]
        record_here = blocks.lookup("record", names[-1])
        # The load left out what was on the device when it began.
        if job.resident_blocks & set(lacking) or (not record_here and names[-1] in job.resident_snapshots):
            return False
        record = None if record_here else blocks.reserve_snapshot(names[-1])
        if not record_here and record is None:
            return True  # all snapshots are in use, so a second load would not help
        held = blocks.touch([name for name in names if name not in set(lacking)])
        new = blocks.allocate(len(lacking))
        if new is not None:
            pages = dict(zip(lacking, new, strict=True))
            for parent, name in itertools.pairwise([seed, *names]):
                if name in pages:
                    blocks.cache_block(parent, name, pages[name])
                    if self.is_local:
                        self._transfers.append(LoadOp("block", pages[name], job.blocks[name]))
        if record is not None:
            if self.is_local and new is not None:
                assert job.record is not None  # the load brought what the pool lacks
                self._transfers.append(LoadOp("record", record, job.record))
            blocks.commit_snapshot(names[-1], record, valid=new is not None)
        if new is not None:
            held = cast("list[int]", [blocks.lookup("block", name) for name in names])  # the pool has all of them
        blocks.free(held)
        self.num_restored += len(new or ())
        return True

    # --- called by `OffloadConnector` ------------------------------------------------------------------------------

    @property
    def num_idle(self) -> int:
        """Number of idle blocks and snapshots that wait to be offloaded."""
        return sum(map(len, self._backlog.values()))

    @property
    def has_transfers(self) -> bool:
        """Whether `run_transfers` has anything to do."""
        return bool(self._transfers or self.num_idle)

    def run_transfers(self, caches: KVCaches, idle: bool = True) -> KVCaches:
        """Return the KV caches after the copies that the block pool needs; call before the next plan is dispatched.

        idle: nothing waits for the device, so idle blocks are copied without the limit per call.
        """
        transfers, self._transfers = self._transfers, []
        for (_, kind), run in itertools.groupby(transfers, lambda move: (type(move), move.kind)):
            ops = list(run)  # of one type
            if loads := [op for op in ops if isinstance(op, LoadOp)]:
                caches = self._load(caches, kind, loads)
            else:
                self._store(caches, kind, [op for op in ops if isinstance(op, StoreOp)])
        for kind, backlog in self._backlog.items():
            room = self.transfer.num_free(self.schemas[kind])
            run = [backlog[name] for name in itertools.islice(backlog, room if idle else min(room, _BATCH))]
            for op in run:
                del backlog[op.name]
            self._store(caches, kind, [op for op in run if self._blocks.lookup(kind, op.name) == op.number])
        return caches

    def _store(self, caches: KVCaches, kind: str, ops: list[StoreOp]) -> None:
        schema = self.schemas[kind]
        ops = [op for op in ops if self.transfer.should_store(schema.key(op.name))]
        if self._second_use:
            ops = [op for op in ops if self._lookups.get(op.name)]
        room = self.transfer.num_free(schema)
        self.transfer.record_dropped(len(ops[room:]))
        for batch in _batches(ops[:room]):
            numbers = np.zeros(_BATCH if len(batch) > 1 else 1, np.int32)
            numbers[: len(batch)] = [op.number for op in batch]
            try:
                payloads = pack_blocks(caches, self._kinds, kind, jax.device_put(numbers, self._device))[: len(batch)]
                payloads = jax.device_put(payloads, self._pinned) if self._pinned else payloads
            except RuntimeError:  # no memory for the copy
                self.transfer.record_dropped(len(batch))
                continue
            for op, payload in zip(batch, payloads, strict=True):
                self.transfer.store(schema, op.name, op.parent, payload)

    def _load(self, caches: KVCaches, kind: str, ops: list[LoadOp]) -> KVCaches:
        for batch in _batches(ops):
            size = _BATCH if len(batch) > 1 else 1
            numbers = np.full(size, np.iinfo(np.int32).max, np.int32)  # padding is out of range and dropped
            numbers[: len(batch)] = [op.number for op in batch]
            payloads = jax.device_put([op.item.payload for op in batch], self._device)
            payloads += payloads[-1:] * (size - len(batch))
            caches = unpack_blocks(caches, self._kinds, kind, jax.device_put(numbers, self._device), payloads)
        return caches

    def wait_for_load(self, seconds: float) -> bool:
        """Wait at most `seconds` for the load of the first waiting request; False if it has none."""
        request, load = next(iter(self._loads.items()), (None, None))
        if request is None or load is None or not self.is_loading(request):
            return False
        if load.fetching:
            load.job.done.wait(seconds)
        return True


def pinned_sharding(device: jax.Device) -> SingleDeviceSharding | None:
    """Sharding of the device's pinned host memory; None if it has none."""
    has = "pinned_host" in {memory.kind for memory in device.addressable_memories()}
    return SingleDeviceSharding(device, memory_kind="pinned_host") if has else None


# --- programs ----------------------------------------------------------------------------------------------------


def leaf_kinds(caches: KVCaches) -> tuple[str, ...]:
    """Kind of every leaf: "block" (rows are KV blocks), "record" (rows are state slots), "hot" (device entries)."""
    parts = {"entries": "block", "index_keys": "block", "device_cache": "hot"}
    kind = lambda path: next((parts[name] for key in path if (name := getattr(key, "name", None)) in parts), "record")
    return tuple(kind(path) for path, _ in jax.tree_util.tree_leaves_with_path(caches))


def block_schema(caches: KVCaches, kind: str) -> BlockSchema:
    """Schema of one block or state snapshot: a row of every array of that kind."""
    leaves = zip(jax.tree_util.tree_leaves_with_path(caches), leaf_kinds(caches), strict=True)
    rows = [(jax.tree_util.keystr(path), leaf) for (path, leaf), its in leaves if its == kind]
    return BlockSchema(kind, tuple((name, leaf.dtype.name, tuple(leaf.shape[1:])) for name, leaf in rows))


@functools.partial(jax.jit, static_argnums=(1, 2))
def pack_blocks(caches: KVCaches, kinds: tuple[str, ...], kind: str, number_N: jax.Array) -> list[jax.Array]:
    """Gather N blocks or snapshots; each becomes one uint8 [bytes] array, so that one copy moves it."""
    count = number_N.shape[0]
    leaves = zip(jax.tree.leaves(caches), kinds, strict=True)
    rows = [host_gather(leaf, number_N) for leaf, its in leaves if its == kind]
    data = jnp.concatenate([jax.lax.bitcast_convert_type(row, jnp.uint8).reshape(count, -1) for row in rows], axis=1)
    return [data[i] for i in range(count)]


@functools.partial(jax.jit, static_argnums=(1, 2), donate_argnums=0)
def unpack_blocks(
    caches: KVCaches, kinds: tuple[str, ...], kind: str, number_N: jax.Array, payloads: list[jax.Array]
) -> KVCaches:
    """Write the bytes of N blocks or snapshots to the rows number_N; rows out of range are dropped."""
    leaves, tree = jax.tree.flatten(caches)
    data, start = jnp.stack(payloads), 0
    for i, (leaf, its) in enumerate(zip(leaves, kinds, strict=True)):
        if its == kind:
            shape, width = (len(payloads), *leaf.shape[1:]), leaf.dtype.itemsize
            end = start + math.prod(leaf.shape[1:]) * width
            rows = data[:, start:end].reshape(*shape, width) if width > 1 else data[:, start:end].reshape(shape)
            new = jax.lax.bitcast_convert_type(rows, leaf.dtype)
            leaves[i] = host_scatter(leaf, new, number_N)
            start = end
    caches = jax.tree.unflatten(tree, leaves)
    if kind == "record":
        return caches
    invalidate = lambda cache: cache.invalidate_copies(number_N)
    return jax.tree.map(invalidate, caches, is_leaf=lambda a: isinstance(a, PagedLayerCache))


def _batches(things: list) -> list[list]:
    return [things[i : i + _BATCH] for i in range(0, len(things), _BATCH)]
