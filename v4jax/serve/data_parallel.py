"""Placement of an engine's arrays: one device, or all devices of a mesh, each with its own state slots and KV blocks.

On a mesh, the first axis of every array except the weights concatenates the rows of the devices, in the mesh's order.
Experts are sharded over the devices, and tokens are dispatched to them; all other weights are replicated
(`configs/sharding/serve.py`). Every process runs the schedulers of all devices and receives all tokens, so all
processes plan the same steps. Each process uploads only the shards of its own devices.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from v4jax import config
from v4jax.checkpoint.model_io import ShardingFn
from v4jax.core.errors import UserError
from v4jax.parallel.host_memory import is_host
from v4jax.parallel.rules import MeshRules, make_mesh_rules


class DataParallelGroup:
    """The devices of an engine. count: number of devices. sharding: the mesh and its rules; None for one device."""

    def __init__(self, sharding: MeshRules | None):
        self.sharding, self.count = sharding, 1
        if sharding is not None:
            validate_sharding(sharding)
            self.count = sharding.mesh.size
            self._rows = sharding.named(row_spec(sharding))
            here = jax.process_index()
            self._mine = [(i, one) for i, one in enumerate(sharding.mesh.devices.flat) if one.process_index == here]

    @property
    def devices(self) -> list[jax.Device]:
        """All devices, including those of other processes, in the mesh's order."""
        if self.sharding is None:
            return [jnp.zeros(()).device]
        return list(self.sharding.mesh.devices.flat)

    @property
    def processes(self) -> list[int]:
        """Process index of every device, in the mesh's order."""
        if self.sharding is None:
            return [jax.process_index()]
        return [device.process_index for device in self.sharding.mesh.devices.flat]

    @property
    def placement(self) -> ShardingFn | None:
        """Sharding of each weight while a checkpoint is read; None on one device."""
        sharding = self.sharding
        if sharding is None:
            return None
        return lambda letters, _: sharding.named(sharding.weight(letters))

    def shard_rows(self, tree):
        """Upload numpy arrays that hold the rows of all devices; each device gets its own rows."""
        if self.sharding is None:
            return jax.device_put(tree)
        part = lambda a, i: a[i * (len(a) // self.count) :][: len(a) // self.count]
        return jax.tree.map(lambda a: self._array([part(a, i) for i, _ in self._mine]), tree)

    def replicate(self, tree):
        """Give every device a copy of one device's arrays, concatenated along the first axis.

        On one device, commit the arrays to it. Outputs of a jitted function are committed as soon as one input is, so
        starting from uncommitted arrays would compile every step function twice.
        """
        if self.sharding is None:
            return jax.tree.map(_committed, tree)
        return jax.tree.map(lambda a: self._array([a] * len(self._mine)), tree)

    def _array(self, parts: list) -> jax.Array:
        """Build one global array from the parts of this process's devices, in their order."""
        parts = jax.device_put(parts, [device for _, device in self._mine])
        shape = (self.count * parts[0].shape[0], *parts[0].shape[1:])
        return jax.make_array_from_single_device_arrays(shape, self._rows, parts)

    def split_devices(self, tree) -> list:
        """Split global arrays into one tree per device of this process, without a copy; undo with `join_devices`."""
        if self.sharding is None:
            return [tree]
        leaves, structure = jax.tree.flatten(tree)
        place = {device: i for i, (_, device) in enumerate(self._mine)}
        shards = [sorted(leaf.addressable_shards, key=lambda shard: place[shard.device]) for leaf in leaves]
        return [jax.tree.unflatten(structure, [each[i].data for each in shards]) for i in place.values()]

    def join_devices(self, trees: list):
        """Join one tree per device of this process, as `split_devices` returns them, into global arrays."""
        if self.sharding is None:
            return trees[0]
        return jax.tree.map(lambda *parts: self._array(list(parts)), *trees)

    def get(self, tree):
        """Copy global arrays, the rows of all devices, to the host; every process gets all rows."""
        if self.sharding is not None and jax.process_count() > 1:
            tree = _gathered(NamedSharding(self.sharding.mesh, PartitionSpec()))(tree)
        return jax.device_get(tree)


def _committed(array: jax.Array) -> jax.Array:
    if is_host(array):
        return array
    [device] = array.devices()
    return jax.device_put(array, SingleDeviceSharding(device, memory_kind=device.default_memory().kind))


@functools.lru_cache(maxsize=4)
def _gathered(whole: NamedSharding):
    return jax.jit(lambda tree: tree, out_shardings=whole)


def row_spec(sharding: MeshRules) -> PartitionSpec:
    """PartitionSpec that shards the first axis over the devices."""
    return PartitionSpec(sharding.axes("activations", "batch"))


def data_parallel_group(mesh: config.Mesh | None, devices: Sequence[jax.Device] | None = None) -> DataParallelGroup:
    """Make the group over `devices` (default: all devices of all processes), or of one device if `mesh` is falsy.

    Raises:
        UserError: serving cannot use the mesh or its sharding rules.
    """
    return DataParallelGroup(make_mesh_rules(mesh, devices) if mesh else None)


def validate_sharding(sharding: MeshRules) -> None:
    """Raise UserError unless rows are sharded over all devices, and no weights but experts are sharded."""
    rules, mesh = sharding.rules, sharding.mesh
    everywhere = sharding.axes("activations", "batch")
    if sharding.size(everywhere) != mesh.size:
        over = ", ".join(axis for axis in mesh.axis_names if mesh.shape[axis] > 1 and axis not in everywhere)
        raise UserError(
            f"serving gives every device rows of its own, and mesh.rules {rules.name!r} splits something else "
            f"over {over}; leave those axes at 1"
        )
    if {axis for name, _ in rules.weights if name != "expert" for axis in sharding.axes("weights", name)}:
        raise UserError(
            f"serving splits experts and keeps all other weights whole, and mesh.rules {rules.name!r} splits "
            "more; set mesh.rules (--mesh) to 'serve'"
        )


def validate_engine(on: DataParallelGroup, model: config.Model, limits: config.Serve, cache: config.Cache) -> None:
    """Raise UserError if the experts do not divide over the devices, or an option needs an engine on one device."""
    if on.sharding is None:
        return
    over = on.sharding.size(on.sharding.axes("weights", "expert"))
    if model.moe.n_routed_experts % over:
        raise UserError(
            f"{model.moe.n_routed_experts} experts cannot be split over {over} devices; take a number that divides "
            "them, and let mesh.data take the rest"
        )
    for name, given in {
        "batch_invariant": limits.batch_invariant,
        "kv_device_entries": cache.kv_device_entries,
    }.items():
        if given:
            raise UserError(f"{name} needs an engine on one device; leave it out, or the mesh")
