"""Allocation of the KV caches of an engine.

All arrays are on the device, unless `cache.kv_device_entries` is set. Then two parts are in host memory: the entries
of CSA layers, of which a step reads few, and the compressor state of HCA layers, to which a step adds one row and
which it seldom reads.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from v4jax import config
from v4jax.cache.entry_cache import read_counters
from v4jax.cache.entry_pool import EntryPool, FloatPool
from v4jax.cache.host_pool import new_host_entry_pool, pinned_zeros
from v4jax.cache.kv_cache_spec import KVCacheSpec
from v4jax.cache.paged_cache import PagedLayerCache, new_paged_layer_cache
from v4jax.cache.pools import new_pool
from v4jax.core.errors import UserError
from v4jax.kernels.attention import use_gather
from v4jax.models.transformer import KVCacheList, Transformer
from v4jax.nn.kv_cache_interface import LayerCache
from v4jax.parallel.host_memory import is_host

# Field of PagedLayerCache that is stored in host memory where `kv_device_entries` is set.
HOST_FIELDS = {"csa": "entries", "hca": "compressor_state"}


def allocate_layer(
    spec: KVCacheSpec,
    kind: str,
    pages: int,
    records: int,
    slack: int = 0,
    host: Callable[..., jax.Array] | None = None,
) -> PagedLayerCache:
    """Allocate the empty cache of one layer.

    Args:
      spec: formats and sizes of the cache.
      kind: layer type ("swa", "csa" or "hca").
      pages: number of blocks.
      records: number of state slots.
      slack: tokens that speculative decoding may go back.
      host: allocates host memory, as in `new_host_entry_pool`; None takes pinned memory of the layer's device.

    Raises:
      UserError: the format cannot hold the model's shapes, or the device has no or too little pinned host memory.
    """
    model = spec.model
    host_field = HOST_FIELDS.get(kind) if spec.num_device_entries else None
    slots = spec.entries(kind) if kind != "swa" else 0

    def pool(part: str) -> EntryPool | None:
        if host_field == "entries" and part == "main":
            return None
        return new_pool(model, part, pages, slots, spec.kv_cache_dtype)

    cache = new_paged_layer_cache(model, kind, records, pool, jnp.dtype(model.dtype), slack)
    if host_field is None:
        return cache
    if host is None:
        [device] = cache.window_ring_ZSH.devices()
        host = functools.partial(pinned_zeros, device)
    if host_field == "entries":
        main, hot = new_host_entry_pool(model, pages, slots, spec.kv_cache_dtype, spec.num_device_entries, host)
        return dataclasses.replace(cache, entries=main, device_cache=hot)
    state = {name: host(a.shape, a.dtype) for name, a in cache.compressor_state.items()}
    return dataclasses.replace(cache, compressor_state=state)


def contiguous_caches(model: Transformer, batch: int, tokens: int) -> KVCacheList:
    """Allocate an unpaged float cache: row b of the batch owns state slot b and block b.

    Args:
      model: the model whose layers need a cache.
      batch: rows of the batch.
      tokens: the most tokens of a row.

    Returns:
      A cache of each layer, stacked like the model's layers (leading axis of repeats).
    """
    config, dtype = model.config, jnp.dtype(model.config.dtype)

    def one(kind: str, repeats: int) -> LayerCache:
        width = {"main": config.head_dim, "index": config.indexer.index_head_dim}
        slots = max(1, tokens // config.compress_rate(kind)) if kind != "swa" else 0
        pool = lambda part: FloatPool(jnp.zeros((batch, slots, width[part]), dtype))
        cache = new_paged_layer_cache(config, kind, batch, pool, dtype)
        return jax.tree.map(lambda a: jnp.broadcast_to(a, (repeats, *a.shape)), cache) if repeats > 1 else cache

    return [[one(layer.attention, stack.repeats) for layer in stack.pattern] for stack in model.stack_specs]


def memory_stats(kv_caches) -> dict[str, float]:
    """Return the bytes of all caches in `kv_caches`, `kv_device_used_bytes` and `kv_host_used_bytes`.

    With host-resident entries, `device_entry_cache_hits` and `device_entry_cache_misses` count top-k entries of decode
    steps over all layers that were found on the device and that were fetched; `device_entry_cache_fetched_bytes` are
    the bytes fetched, and `device_entry_cache_hit_rate` is the fraction of hits.
    """
    held = {False: 0, True: 0}
    for array in jax.tree.leaves(kv_caches):
        held[is_host(array)] += array.nbytes
    caches = [
        one
        for one in jax.tree.leaves(kv_caches, is_leaf=lambda a: isinstance(a, PagedLayerCache))
        if one.device_cache is not None
    ]
    counts: dict[str, float] = {"kv_device_used_bytes": held[False], "kv_host_used_bytes": held[True]}
    if not caches:
        return counts
    counters = jax.device_get([one.device_cache.counters_5 for one in caches])
    hits, misses = np.sum([read_counters(count_5) for count_5 in counters], axis=0).tolist()
    return counts | {
        "device_entry_cache_hits": hits,
        "device_entry_cache_misses": misses,
        "device_entry_cache_hit_rate": hits / max(hits + misses, 1),
        "device_entry_cache_fetched_bytes": misses * caches[0].entries.row_bytes,
    }


def validate_host_resident(model: config.Model, limits: config.Serve, cache: config.Cache) -> None:
    """Raise UserError if host-resident entries are configured but impossible or useless for these limits."""
    if not cache.kv_device_entries:
        return
    if "csa" not in model.layer_types:
        raise UserError(
            "kv_device_entries is for the top-k entries of csa layers, and this model has none: set it to 0"
        )
    rows = 1 if limits.batch_invariant else limits.max_num_seqs
    queries, k = 1 + limits.num_speculative_tokens, model.indexer.index_topk
    if cache.kv_device_entries < rows * queries * k:
        raise UserError(
            f"kv_device_entries of {cache.kv_device_entries} entries is less than a step may pick: {rows} sequences x "
            f"{queries} tokens x topk {k}; give at least {rows * queries * k}, or lower max_num_seqs"
        )
    spec = KVCacheSpec(model, cache.kv_cache_dtype, cache.block_size)
    blocks = -(-(limits.max_model_len + limits.num_speculative_tokens) // spec.block_size)
    if not use_gather(blocks * spec.entries("csa"), k, queries):
        raise UserError(
            f"kv_device_entries is of no use with max_model_len {limits.max_model_len}, where each step reads all "
            "entries of a row: set it to 0"
        )
