"""Pools of entries in host memory, from which the device fetches single rows.

A row is one run of 32-bit words that holds all its planes side by side, so a fetch reads one piece. XLA:TPU reads and
writes host memory in place only in this width (see `parallel/host_memory.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from v4jax import config
from v4jax.cache import kv_cache_spec
from v4jax.cache.entry_cache import DeviceEntryCache, new_device_entry_cache
from v4jax.cache.entry_pool import EntryPool
from v4jax.cache.pools import zeros
from v4jax.core.errors import UserError
from v4jax.core.pytree import pytree
from v4jax.parallel.host_memory import host_compute, host_gather

_WORD = 4  # bytes


@pytree
class HostEntryPool(EntryPool):
    """A pool in host memory, in any storage format.

    Attributes:
      words: uint32 [blocks, slots, words per row].
      row: storage format of a row.
    """

    words: jax.Array
    row: kv_cache_spec.EntryFormat = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """(blocks, rows per block, row width)."""
        return (*self.words.shape[:2], self.row.width)

    @property
    def row_bytes(self) -> int:
        """Bytes per row in host memory."""
        return self.words.shape[-1] * _WORD

    def encode(self, rows: jax.Array) -> HostEntryPool:
        planes = jax.tree.leaves(zeros(self.row, 0, 0).encode(rows))
        return HostEntryPool(jnp.concatenate([_to_words(plane) for plane in planes], axis=-1), self.row)

    def decode(self, compute: jnp.dtype) -> jax.Array:
        return self._unpacked().decode(compute)

    def fetch(self, page: jax.Array, slot: jax.Array) -> EntryPool:
        """Copy the encoded rows at int32 block [...] and slot [...] to the device, as a pool of arrays [..., n]."""
        return HostEntryPool(host_gather(self.words, page, slot), self.row)._unpacked()

    def _unpacked(self) -> EntryPool:
        leaves, tree = jax.tree.flatten(jax.eval_shape(lambda: zeros(self.row, 0, 0)))
        planes, first = [], 0
        for leaf in leaves:
            end = first + -(-leaf.shape[-1] * leaf.dtype.itemsize // _WORD)
            planes.append(_from_words(self.words[..., first:end], leaf.shape[-1], leaf.dtype))
            first = end
        return jax.tree.unflatten(tree, planes)


def new_host_entry_pool(
    model: config.Model, pages: int, slots: int, kv_cache_dtype: str, copies: int, host: Callable[..., jax.Array]
) -> tuple[HostEntryPool, DeviceEntryCache]:
    """Allocate an empty host pool for the main entries of one layer, and its device cache.

    Args:
      model: the model's config.
      pages: number of blocks.
      slots: entries per block.
      kv_cache_dtype: one of `kv_cache_spec.KV_CACHE_DTYPES`.
      copies: entries that the device cache has room for.
      host: host(shape, dtype) allocates zeros in host memory, for example by `pinned_zeros`.

    Raises:
      UserError: the dtype is unknown or cannot hold the model's shapes (see `kv_cache_spec.entry_format`).
    """
    row = kv_cache_spec.entry_format(model, "main", kv_cache_dtype)
    words = host((pages, slots, row.words), jnp.uint32)
    return HostEntryPool(words, row), new_device_entry_cache(zeros(row, 1, 1 + copies), pages, slots)


def pinned_zeros(device: jax.Device, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Allocate zeros in the pinned host memory of a device.

    The host computes them, because the device may not have room for them.

    Args:
      device: the device that addresses the memory.
      shape: shape of the array.
      dtype: a dtype of 4 bytes.

    Raises:
      UserError: the device has no or too little pinned host memory.
    """
    if "pinned_host" not in {memory.kind for memory in device.addressable_memories()}:
        raise UserError(
            f"{device.platform} devices here have no pinned_host memory to keep entries in: set kv_device_entries to 0"
        )
    make = functools.partial(jax.lax.full, shape, 0, dtype)
    where = SingleDeviceSharding(device, memory_kind="pinned_host")
    try:
        return jax.block_until_ready(jax.jit(lambda: host_compute(make)(), out_shardings=where)())
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        raise UserError(
            f"the host has no {_WORD * math.prod(shape):,} bytes of pinned memory for a layer's share of the cache; "
            "lower kv_cache_memory_bytes or kv_cache_tokens"
        ) from error


def _to_words(plane: jax.Array) -> jax.Array:
    """Bitcast [..., n] of 1, 2 or 4 bytes per number to uint32 [..., words]. The last word is padded with zeros."""
    each = _WORD // plane.dtype.itemsize
    if each > 1:
        plane = jnp.pad(plane, [(0, 0)] * (plane.ndim - 1) + [(0, -plane.shape[-1] % each)])
        plane = plane.reshape(*plane.shape[:-1], -1, each)
    return jax.lax.bitcast_convert_type(plane, jnp.uint32)


def _from_words(words: jax.Array, count: int, dtype: jnp.dtype) -> jax.Array:
    """Invert `_to_words`: bitcast uint32 [..., words] to `dtype` [..., count]."""
    plane = jax.lax.bitcast_convert_type(words, dtype)
    return plane.reshape(*words.shape[:-1], -1)[..., :count]
