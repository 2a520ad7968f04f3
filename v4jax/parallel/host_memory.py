"""Rows of arrays by index, on the device or in host memory; the types say where an array lies.

An array in host memory (memory kind `pinned_host`) is read and written by the host: the indices go there, the rows come
or go with them, and the array itself stays and is updated in place if it is donated. XLA:TPU compiles that without a
copy of the array where its rows are words of 32 bits; other widths it refuses, or copies all of the array.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

try:  # its name before jax 0.12, where `compute_on` was something else
    from jax.experimental.compute_on import compute_on2 as compute_on
except ImportError:
    from jax.experimental.compute_on import compute_on

HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device

# Negative numbers are out of range like those past the end, not counted from it.


def host_scatter(array: jax.Array, new: jax.Array, *index: jax.Array) -> jax.Array:
    """array [pages, ...] with `new` at int32 `index` of its first axes; those out of range are dropped."""
    new = jnp.asarray(new).astype(array.dtype)
    if not is_host(array):
        return array.at[index].set(new, mode="drop", wrap_negative_indices=False)
    at_N, n = _joined(index), len(index)
    rank, rest = at_N.ndim - 1, array.ndim - n
    new = jnp.broadcast_to(new, (*at_N.shape[:-1], *array.shape[n:]))
    numbers = lax.ScatterDimensionNumbers(tuple(range(rank, rank + rest)), tuple(range(n)), tuple(range(n)))
    write = lambda *args: lax.scatter(*args, numbers, mode=lax.GatherScatterMode.FILL_OR_DROP)
    return host_compute(write)(array, *jax.device_put((at_N, new), HOST))


def host_gather(array: jax.Array, *index: jax.Array) -> jax.Array:
    """array[index], on the device; numbers out of range give some row."""
    if not is_host(array):
        return array.at[index].get(mode="clip", wrap_negative_indices=False)
    n, rest = len(index), array.shape[len(index) :]
    at_N = jnp.clip(_joined(index), 0, jnp.array(array.shape[:n], jnp.int32) - 1)
    rank = at_N.ndim - 1
    numbers = lax.GatherDimensionNumbers(tuple(range(rank, rank + len(rest))), tuple(range(n)), tuple(range(n)))
    mode = lax.GatherScatterMode.PROMISE_IN_BOUNDS  # they were clipped on the device
    read = lambda *args: lax.gather(*args, numbers, (*[1] * n, *rest), mode=mode)
    return jax.device_put(host_compute(read)(array, jax.device_put(at_N, HOST)), DEVICE)


def is_host(array: jax.Array) -> bool:
    """Whether an array, or what stands for it while a program is traced, lies in host memory."""
    return jax.typeof(array).memory_space == HOST


def host_compute(function):
    """`function` of arrays in host memory, computed by the host, its results left there."""
    return compute_on(function, compute_type="device_host", out_memory_spaces=HOST)


def _joined(index: tuple[jax.Array, ...]) -> jax.Array:
    return jnp.stack(jnp.broadcast_arrays(*(jnp.asarray(i, jnp.int32) for i in index)), -1)
