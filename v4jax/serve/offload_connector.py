"""Offload tiers of an engine, shared by all devices of a process, and one `DeviceKVConnector` per device.

A request on any device of a process can reuse a block that another device of that process computed. Each process has
its own tiers, with its own budgets and directory, so a request is assigned with regard to the process that stores most
of its prompt (`OffloadConnector.num_offloaded_blocks`).
"""

from __future__ import annotations

import functools
import logging
import os
import pathlib
import time
import weakref
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from v4jax import config
from v4jax.cache.kv_cache_spec import KVCacheSpec
from v4jax.cache.offload.disk_tier import DiskTier, allocated_size
from v4jax.cache.offload.host_tier import HostTier
from v4jax.cache.offload.manager import OffloadManager
from v4jax.cache.offload.private_directory import open_private
from v4jax.core.errors import UserError
from v4jax.parallel import distributed
from v4jax.serve.data_parallel import DataParallelGroup
from v4jax.serve.device_connector import DeviceKVConnector, block_schema, leaf_kinds, pinned_sharding
from v4jax.serve.model_steps import KVCaches

_log = logging.getLogger(__name__)


def build(
    caches: KVCaches, dp_group: DataParallelGroup, cache: config.Cache, spec: KVCacheSpec
) -> OffloadConnector | None:
    """Build the tiers of a config and log their capacity; None if the config has none. Raises UserError."""
    if not (cache.kv_host_bytes or cache.kv_disk_bytes):
        return None
    if not spec.block_bytes:
        raise UserError("a model of window layers alone keeps no blocks for a cache on host or disk: drop those tiers")
    host = HostTier(cache.kv_host_bytes, cache.kv_eviction_policy) if cache.kv_host_bytes else None
    own = str(jax.process_index()) if jax.process_count() > 1 else ""
    directory = pathlib.Path(cache.kv_dir) / own
    if cache.kv_disk_bytes and own:  # the directories of all processes share this parent, so it must be trusted too
        os.close(open_private(directory.parent))
    disk = (
        DiskTier(directory, cache.kv_disk_bytes, cache.kv_eviction_policy, deadline=cache.kv_load_timeout_s)
        if cache.kv_disk_bytes
        else None
    )
    try:
        connector = OffloadConnector(
            caches,
            dp_group,
            host,
            disk,
            cache.kv_load_timeout_s,
            spec.block_size,
            second_use=cache.kv_admission_policy == "second",
        )
    except BaseException:  # such as an interrupt; another engine of this process may use the directory next
        if disk is not None:
            disk.close()
        raise
    _log.info("cache: %s", connector.summary)
    return connector


class OffloadConnector:
    """The offload tiers of one engine in this process, and a `DeviceKVConnector` for each device of all processes.

    tokens: tokens per block. deadline: seconds without progress after which a load is abandoned. second_use: store only
    blocks that a second request looked up. summary: capacity of device and tiers in tokens, as text.
    """

    def __init__(
        self,
        caches: KVCaches,
        dp_group: DataParallelGroup,
        host: HostTier | None,
        disk: DiskTier | None,
        deadline: float,
        tokens: int,
        *,
        second_use: bool = False,
    ):
        self._dp_group, parts = dp_group, dp_group.split_devices(caches)
        self.schemas = {kind: block_schema(parts[0], kind) for kind in ("block", "record")}
        leaves = jax.tree.leaves(parts[0])
        [device] = leaves[0].devices()
        place = functools.partial(_to_host, pinned_sharding(device))
        schemas = self.schemas["block"], self.schemas["record"]
        self.transfer = OffloadManager(*schemas, host, disk, place=place, deadline=deadline)
        weakref.finalize(self, self.transfer.close)  # for an engine that was never closed, and at process exit
        self._processes, local_parts = dp_group.processes, iter(parts)
        self.multi_process = len(set(self._processes)) > 1
        device_parts = [next(local_parts) if process == jax.process_index() else None for process in self._processes]
        self.device_connectors = [
            DeviceKVConnector(part, self.transfer, self.schemas, second_use=second_use, synced=self.multi_process)
            for part in device_parts
        ]
        self._local_devices = [device for device in self.device_connectors if device.is_local]
        self.summary = self._describe(leaves[leaf_kinds(parts[0]).index("block")].shape[0] - 1, tokens)

    def _describe(self, pages: int, tokens: int) -> str:
        devices, block = len(self.device_connectors), self.schemas["block"]
        parts = [f"{'device' if devices == 1 else f'each of {devices} devices'} {pages * tokens:,} tokens"]
        of = f"of each of {len(set(self._processes))} processes: " if self.multi_process else ""
        for name, tier in self.transfer.tiers.items():
            held, size = tier.stats(), allocated_size(block.file_bytes) if name == "disk" else block.nbytes
            room, there = held["budget"] // size * tokens, held["blocks"] * tokens
            parts.append(f"{of}{name} up to {room:,} ({there:,} are there)")
            of = ""
        return ", ".join(parts)

    def sync_loads(self) -> None:
        """Share the results of the waiting requests' loads among all processes.

        The process that owns a request's device reports its result. All processes must call this at the same step; with
        one process it does nothing.
        """
        if not self.multi_process:
            return
        loads = [(device, load) for device in self.device_connectors for load in device.pending]
        if loads:
            results = [device.poll(load) if device.is_local else None for device, load in loads]
            packed = np.array([-1 if answer is None else answer for answer in results], np.int32).tobytes()
            known = np.max([np.frombuffer(data, np.int32) for data in distributed.all_gather_bytes(packed)], axis=0)
            for (_, load), boundary in zip(loads, known, strict=True):
                load.num_loaded = None if boundary < 0 else int(boundary)

    def num_offloaded_blocks(self, names: Sequence[bytes]) -> list[int]:
        """Return, for each device, the number of prefix blocks that a request could load from the device's tiers.

        All processes must call this at the same step. With one process all devices share the tiers, so the numbers
        would not affect the choice of a device, and all are 0.
        """
        if not self.multi_process:
            return [0] * len(self.device_connectors)
        own = np.int32(self.transfer.lookup(names)).tobytes()
        by_process = [int(np.frombuffer(data, np.int32)[0]) for data in distributed.all_gather_bytes(own)]
        return [by_process[process] for process in self._processes]

    def run_transfers(self, caches: KVCaches, idle: bool = True) -> KVCaches:
        """Return the KV caches after the copies that the block pools need; call before the next plan is dispatched.

        idle: nothing waits for the devices, so idle blocks are copied without the limit per call.
        """
        if not any(device.has_transfers for device in self.device_connectors):
            return caches
        parts = self._dp_group.split_devices(caches)  # the parts are donated, which also invalidates `caches`
        return self._dp_group.join_devices(
            [device.run_transfers(part, idle) for device, part in zip(self._local_devices, parts, strict=True)]
        )

    def wait_for_load(self) -> None:
        """Wait at most 10 ms for a load; call it when the engine has no other work."""
        any(device.wait_for_load(0.01) for device in self.device_connectors)  # `any` stops at the first that waits

    def flush(self, caches: KVCaches, seconds: float) -> bool:
        """Offload all idle blocks within `seconds`; return whether nothing is left queued."""
        end = time.monotonic() + seconds
        while any(device.num_idle for device in self.device_connectors) and time.monotonic() < end:
            for device, part in zip(self._local_devices, self._dp_group.split_devices(caches), strict=True):
                device.run_transfers(part)
            self.transfer.flush(end - time.monotonic())
        return self.transfer.flush(max(end - time.monotonic(), 0))

    def close(self, caches: KVCaches, seconds: float) -> None:
        """Flush for at most `seconds`, then close the tiers."""
        self.flush(caches, seconds)
        self.transfer.close(0.0)

    def stats(self) -> dict[str, float]:
        """Return the counters of this process's tiers, and blocks restored and idle, summed over all devices."""
        return self.transfer.stats() | {
            "restored_blocks": sum(device.num_restored for device in self.device_connectors),
            "queue_idle": sum(device.num_idle for device in self.device_connectors),
        }


def _to_host(memory: SingleDeviceSharding | None, payload: np.ndarray) -> np.ndarray | jax.Array:
    """Copy a file's bytes to the memory in which the host tier stores them: pinned memory if there is any."""
    try:
        return payload if memory is None else jax.device_put(payload, memory)
    except RuntimeError:  # no pinned memory is left
        return payload
