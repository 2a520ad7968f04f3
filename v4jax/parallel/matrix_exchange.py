"""Whole matrices of arrays that a mesh splits, each on one device: they travel there in parts, and back."""

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
    """`function` of every matrix of every array, which keeps a matrix' shape.

    arrays: the last `axes` axes make a matrix (two sides, of one axis or several), those before count matrices; all
    matrices are of one shape and split alike. specs: how each array lies on the mesh, and its result will.

    The k devices that share the parts of some matrices exchange them in rounds (all-to-all): each gets a matrix, works
    on it and sends the parts back, so memory holds one matrix more than it held. Where r such groups hold the same
    parts (`replicas`) each takes every r-th round and gives the results to the others. n matrices take n / (k r)
    rounds, rounded up; arrays that have too few for one round share theirs.
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
    """Which arrays, by place, share rounds of `turn` matrices: those of too few for one; each other has its own."""
    few = [i for i, count in enumerate(counts) if count < turn]
    return [few] * bool(few) + [[i] for i, count in enumerate(counts) if count >= turn]


def replica_axes(sharding: MeshRules, spec: PartitionSpec) -> tuple[str, ...]:
    """Mesh axes along which an array that lies so is the same everywhere, but for slices: their network is slow."""
    used = {name for at in spec for name in _names(at)}
    return tuple(axis for axis, size in sharding.mesh.shape.items() if size > 1 and axis not in used | {"slice"})


def _names(at: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (at,) if isinstance(at, str) else at or ()
