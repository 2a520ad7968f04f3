"""Sizes of an engine's KV cache, and the check that they fit in free memory before anything is allocated.

The options may come from a checkpoint of unknown origin. Without the check, a cache that is too large ends in an error
of the device after the weights have been read, or on a CPU in a killed process.
"""

from __future__ import annotations

from typing import NamedTuple

import jax

from v4jax import config
from v4jax.cache.kv_cache_spec import KVCacheSpec
from v4jax.core.errors import UserError
from v4jax.core.system_memory import available_memory
from v4jax.serve.data_parallel import DataParallelGroup

# Bytes of host memory of the Python objects of one block and one state slot, and of one entry of a block table.
_BLOCK_OBJECT, _SLOT_OBJECT, _TABLE_ENTRY = 64, 64, 4


class KVCacheSizes(NamedTuple):
    """Sizes of the cache of one device.

    Attributes:
        num_blocks: blocks of every pool, including the null block 0.
        num_state_slots: state slots of every layer, including the null slot 0.
        table_width: blocks per row of the block table.
        slack: extra tokens of every window ring, which speculative decoding may go back.
    """

    num_blocks: int
    num_state_slots: int
    table_width: int
    slack: int

    def device_bytes(self, spec: KVCacheSpec) -> int:
        """Return the bytes of the cache on the device."""
        return _fixed_bytes(spec, self.num_state_slots, self.slack) + self.num_blocks * spec.block_bytes

    def host_bytes(self, spec: KVCacheSpec) -> int:
        """Return the bytes of the cache that are in host memory (`kv_device_entries`)."""
        return self.num_blocks * spec.host_block_bytes + self.num_state_slots * spec.host_state_bytes(self.slack)


def kv_cache_sizes(spec: KVCacheSpec, limits: config.Serve, cache: config.Cache) -> KVCacheSizes:
    """Compute the sizes of the cache that `Engine` allocates on each device.

    Raises:
        UserError: `kv_cache_memory_bytes` has no room for the state slots and one block.
    """
    k = limits.num_speculative_tokens
    slack = 3 * k  # a snapshot holds up to 2k tokens past its boundary, and k drafts may be rejected
    table_width = -(-(limits.max_model_len + k) // spec.block_size)
    slots = 1 + limits.max_num_seqs + (cache.num_state_snapshots if cache.enable_prefix_caching else 0)
    if cache.kv_cache_memory_bytes:
        blocks = _blocks_in_budget(spec, cache, slots, slack)
    elif cache.kv_cache_tokens:
        blocks = 1 + -(-cache.kv_cache_tokens // spec.block_size)
    else:
        blocks = 1 + limits.max_num_seqs * table_width
    return KVCacheSizes(blocks, slots, table_width, slack)


def check_enough_memory(
    model: config.Model, limits: config.Serve, cache: config.Cache, group: DataParallelGroup
) -> None:
    """Compare the cache with the memory that is free now, on this process's devices and on its host.

    Raises:
        UserError: the cache is larger than the free memory of a device, or its part in host memory is larger than the
            free memory of the host.
    """
    spec = KVCacheSpec(model, cache.kv_cache_dtype, cache.block_size, cache.kv_device_entries)
    sizes = kv_cache_sizes(spec, limits, cache)
    devices = [device for device in group.devices if device.process_index == jax.process_index()]
    # Every process runs the schedulers of all devices.
    objects = _BLOCK_OBJECT * sizes.num_blocks + _SLOT_OBJECT * sizes.num_state_slots
    tables = _TABLE_ENTRY * (limits.max_num_seqs + 1) * sizes.table_width
    host = group.count * (objects + tables) + len(devices) * sizes.host_bytes(spec)
    needed = sizes.device_bytes(spec)
    for device in devices:
        free = _free_memory(device)
        if free is None:
            host += needed
        elif needed > free:
            raise _refusal(limits, cache, needed, f"{free:,} of {device} are free")
    if host > (free := available_memory()):
        raise _refusal(limits, cache, host, f"{free:,} of this machine's memory are free")


def _fixed_bytes(spec: KVCacheSpec, slots: int, slack: int) -> int:
    """Return the bytes on the device beside the blocks. The MTP layer has a cache if `slack` is not 0."""
    return slots * spec.state_bytes(slack, mtp=slack > 0) + spec.device_cache_bytes


def _blocks_in_budget(spec: KVCacheSpec, cache: config.Cache, slots: int, slack: int) -> int:
    fixed = _fixed_bytes(spec, slots, slack)
    least = fixed + 2 * spec.block_bytes
    if cache.kv_cache_memory_bytes < least:
        parts = f"{slots} state slots and one block of {spec.block_size} tokens"
        options = "max_num_seqs or num_state_snapshots"
        if cache.kv_device_entries:
            parts += " and the kv_device_entries"
            options = "max_num_seqs, num_state_snapshots or kv_device_entries"
        raise UserError(
            f"a cache of {cache.kv_cache_memory_bytes:,} bytes on the device is too small: {parts} take {least:,}; "
            f"give it more, or lower {options}"
        )
    return spec.blocks_for(cache.kv_cache_memory_bytes - fixed)


def _free_memory(device: jax.Device) -> int | None:
    """Return the free bytes of an accelerator, or None for a device that uses host memory."""
    stats = device.memory_stats() or {}
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None


def _refusal(limits: config.Serve, cache: config.Cache, size: int, free: str) -> UserError:
    names = ("kv_cache_tokens", "kv_cache_memory_bytes", "num_state_snapshots", "kv_device_entries")
    given = {"max_num_seqs": limits.max_num_seqs, "max_model_len": limits.max_model_len}
    given |= {name: getattr(cache, name) for name in names}
    options = ", ".join(f"{name} {value:,}" for name, value in given.items() if value)
    return UserError(
        f"the KV cache takes {size:,} bytes ({options}), and {free}; lower the largest of these, which the checkpoint "
        "sets where you do not"
    )
