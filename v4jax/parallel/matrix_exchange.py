"""Apply a function to unsharded matrices of sharded arrays: all-to-all collects each matrix on one device and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from v4jax.parallel.rules import MeshRules


def map_whole_matrices(
    function: Callable[[jax.Array], jax.Array],
    arrays: Sequence[jax.Array],
    axes: int,
    sharding: MeshRules,
    specs: Sequence[PartitionSpec],
) -> tuple[jax.Array, ...]:
    """Apply `function` to every unsharded matrix of sharded arrays.

    The k devices that hold the shards of one matrix exchange shards in rounds of k matrices. An all-to-all gives each
    device one unsharded matrix, the device applies `function`, and a second all-to-all returns the shards. Memory
    therefore grows by one matrix. Where r groups of devices hold the same shards (`replica_axes`), each group takes
    every r-th round and all-gathers the results. n matrices take ceil(n / (k r)) rounds. Arrays with fewer than k r
    matrices share rounds (`group_small`).

    Args:
        function: maps a matrix to a matrix of the same shape.
        arrays: the last `axes` axes of each array are one matrix (either side may consist of several axes), the axes
            in front count matrices. All matrices have one shape and one sharding.
        axes: number of axes of a matrix.
        sharding: the mesh and its rules.
        specs: sharding of each array and of its result.

    Returns:
        The results, one array for each of `arrays`, with its shape and sharding.
    """
    whole, copies = (None,) * axes, replica_axes(sharding, specs[0])
    split = [(axis, _names(at)) for axis, at in enumerate((*whole, *specs[0])[-axes:]) if at]
    sharers, groups = math.prod(sharding.size(names) for _, names in split), sharding.size(copies)

    def one(parts):
        for axis, names in split:
            parts = jax.lax.all_to_all(parts, names, split_axis=0, concat_axis=1 + axis, tiled=True)
        parts = function(parts[0])[None]
        for axis, names in reversed(split):
            parts = jax.lax.all_to_all(parts, names, split_axis=1 + axis, concat_axis=0, tiled=True)
        return parts

    def rounds(x):
        spare = -len(x) % (groups * sharers)
        parts = jnp.pad(x, ((0, spare), *((0, 0),) * axes)) if spare else x
        turns = parts.reshape(-1, groups, sharers, *x.shape[1:])
        if groups == 1:
            done = jax.lax.map(one, turns[:, 0])
        else:
            done = jax.lax.map(one, turns[:, jax.lax.axis_index(copies)])
            done = jax.lax.all_gather(done, copies, axis=1)
        return done.reshape(parts.shape)[: len(x)]

    def local(*arrays):
        flat = [x.reshape(-1, *x.shape[x.ndim - axes :]) for x in arrays]
        for group in group_small([len(x) for x in flat], groups * sharers):
            ends = np.cumsum([len(flat[i]) for i in group])
            done = rounds(jnp.concatenate([flat[i] for i in group]))
            for i, x in zip(group, jnp.split(done, ends[:-1]), strict=True):
                flat[i] = x
        return tuple(x.reshape(array.shape) for x, array in zip(flat, arrays, strict=True))

    specs = tuple(specs)
    return jax.shard_map(local, mesh=sharding.mesh, in_specs=specs, out_specs=specs, check_vma=False)(*arrays)


def group_small(counts: Sequence[int], turn: int) -> list[list[int]]:
    """Group arrays that share rounds.

    Args:
        counts: number of matrices of each array.
        turn: matrices of one round.

    Returns:
        Groups of indices into `counts`: one group of all arrays with fewer than `turn` matrices (if there are any),
        then one group for each other array.
    """
    few = [i for i, count in enumerate(counts) if count < turn]
    return [few] * bool(few) + [[i] for i, count in enumerate(counts) if count >= turn]


def replica_axes(sharding: MeshRules, spec: PartitionSpec) -> tuple[str, ...]:
    """Return the mesh axes larger than 1 over which an array with this spec is replicated.

    The axis `slice` is left out, because the network between slices is slow.
    """
    used = {name for at in spec for name in _names(at)}
    return tuple(axis for axis, size in sharding.mesh.shape.items() if size > 1 and axis not in used | {"slice"})


def _names(at: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (at,) if isinstance(at, str) else at or ()
