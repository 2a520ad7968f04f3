"""Gather and scatter of rows in arrays in device memory or in host memory. The array's type holds its memory space.

The host itself reads and writes an array in host memory (memory kind `pinned_host`): only indices and rows cross
between device and host. The array stays in host memory and is updated in place if it is donated. XLA:TPU compiles this
without a copy of the array if the elements have 32 bits. It rejects other widths or copies the complete array.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import compute_on
from jax.typing import ArrayLike

# Before jax 0.12 this function is `compute_on2`, and `compute_on` is a different one.
_compute_on: Callable[..., Callable] = getattr(compute_on, "compute_on2", compute_on.compute_on)

HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device

# Negative indices are out of range in this module. They do not count from the end.


def host_scatter(array: jax.Array, new: ArrayLike, *index: jax.Array) -> jax.Array:
    """Write rows into an array in device or host memory.

    Args:
        array: the array to update.
        new: the rows, cast to the dtype of `array`, of a shape that broadcasts to the indexed rows.
        *index: int32 arrays that broadcast together, one for each of the first axes of `array`. Rows with an index
            out of range are dropped.

    Returns:
        The updated array, in the memory space of `array`.
    """
    new = jnp.asarray(new).astype(array.dtype)
    if not is_host(array):
        return array.at[index].set(new, mode="drop", wrap_negative_indices=False)
    at_N, n = _joined(index), len(index)
    rank, rest = at_N.ndim - 1, array.ndim - n
    new = jnp.broadcast_to(new, (*at_N.shape[:-1], *array.shape[n:]))
    numbers = lax.ScatterDimensionNumbers(tuple(range(rank, rank + rest)), tuple(range(n)), tuple(range(n)))
    write = lambda array, at, new: lax.scatter(array, at, new, numbers, mode=lax.GatherScatterMode.FILL_OR_DROP)
    return host_compute(write)(array, *jax.device_put((at_N, new), HOST))


def host_gather(array: jax.Array, *index: jax.Array) -> jax.Array:
    """Read rows `array[index]` from device or host memory.

    Args:
        array: the array to read.
        *index: int32 arrays that broadcast together, one for each of the first axes of `array`. An index out of range
            is clipped and so reads a valid but arbitrary row.

    Returns:
        The rows, in device memory.
    """
    if not is_host(array):
        return array.at[index].get(mode="clip", wrap_negative_indices=False)
    n, rest = len(index), array.shape[len(index) :]
    at_N = jnp.clip(_joined(index), 0, jnp.array(array.shape[:n], jnp.int32) - 1)
    rank = at_N.ndim - 1
    numbers = lax.GatherDimensionNumbers(tuple(range(rank, rank + len(rest))), tuple(range(n)), tuple(range(n)))
    mode = lax.GatherScatterMode.PROMISE_IN_BOUNDS  # the device has clipped the indices
    read = lambda array, at: lax.gather(array, at, numbers, (*[1] * n, *rest), mode=mode)
    return jax.device_put(host_compute(read)(array, jax.device_put(at_N, HOST)), DEVICE)


def is_host(array: jax.Array) -> bool:
    """Whether an array or a tracer is in host memory."""
    return jax.typeof(array).memory_space == HOST


def host_compute(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Wrap `function` so that the host computes it on arrays in host memory. Its results stay in host memory."""
    return _compute_on(function, compute_type="device_host", out_memory_spaces=HOST)


def _joined(index: tuple[jax.Array, ...]) -> jax.Array:
    return jnp.stack(jnp.broadcast_arrays(*(jnp.asarray(i, jnp.int32) for i in index)), -1)
