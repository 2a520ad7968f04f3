"""Where an engine's arrays lie: on one device, or on all devices of a mesh, each with records and pages of its own.

On a mesh the first axis of every array but the weights' is the devices', in the mesh's order: the rows of the first
device, then those of the second, and so on. Experts are split over the devices and tokens travel to them; the other
weights are replicated (`configs/sharding/serve.py`). Every process of a mesh runs the schedulers of all devices and
receives all tokens, so all processes plan the same steps; each uploads the shards of its own devices.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from v4jax import config
from v4jax.checkpoint.model_io import ShardingFn
from v4jax.core.errors import UserError
from v4jax.parallel.host_memory import is_host
from v4jax.parallel.rules import MeshRules, make_mesh_rules


class DataParallelGroup:
    """count: devices. sharding: the mesh and its rules, None for one device."""

    def __init__(self, sharding: MeshRules | None):
        self.sharding, self.count = sharding, 1
        if sharding is not None:
            check(sharding)
            self.count = sharding.mesh.size
            self._rows = sharding.named(row_spec(sharding))
            here = jax.process_index()
            self._mine = [(i, one) for i, one in enumerate(sharding.mesh.devices.flat) if one.process_index == here]

    @property
    def processes(self) -> list[int]:
        """Index of every device's process, in the mesh's order."""
        if self.sharding is None:
            return [jax.process_index()]
        return [device.process_index for device in self.sharding.mesh.devices.flat]

    @property
    def placement(self) -> ShardingFn | None:
        """Where weights go as they are read."""
        if self.sharding is None:
            return None
        return lambda letters, _: self.sharding.named(self.sharding.weight(letters))

    def shard_rows(self, tree):
        """Arrays of the host (numpy), all devices' rows, to the devices."""
        if self.sharding is None:
            return jax.device_put(tree)
        part = lambda a, i: a[i * (len(a) // self.count) :][: len(a) // self.count]
        return jax.tree.map(lambda a: self._array([part(a, i) for i, _ in self._mine]), tree)

    def replicate(self, tree):
        """Arrays of one device, the same for every device: all devices' rows.

        On one device they are bound to it, as what programs return is once such arrays, or those that come back from
        host memory, are among their arguments: else each program would be compiled again for its own results.
        """
        if self.sharding is None:
            return jax.tree.map(_committed, tree)
        return jax.tree.map(lambda a: self._array([a] * len(self._mine)), tree)

    def _array(self, parts: list) -> jax.Array:
        """What each device of this process is to have, as its part of one array."""
        parts = jax.device_put(parts, [device for _, device in self._mine])
        shape = (self.count * parts[0].shape[0], *parts[0].shape[1:])
        return jax.make_array_from_single_device_arrays(shape, self._rows, parts)

    def split_devices(self, tree) -> list:
        """The same arrays as those of each device of this process, with no copy; to be `joined` again."""
        if self.sharding is None:
            return [tree]
        leaves, structure = jax.tree.flatten(tree)
        place = {device: i for i, (_, device) in enumerate(self._mine)}
        shards = [sorted(leaf.addressable_shards, key=lambda shard: place[shard.device]) for leaf in leaves]
        return [jax.tree.unflatten(structure, [each[i].data for each in shards]) for i in place.values()]

    def join_devices(self, trees: list):
        """What `split` took apart, the devices' trees perhaps changed."""
        if self.sharding is None:
            return trees[0]
        return jax.tree.map(lambda *parts: self._array(list(parts)), *trees)

    def get(self, tree):
        """Arrays of the devices to the host, all devices' rows, in every process."""
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
    """How the devices' rows are split."""
    return PartitionSpec(sharding.axes("activations", "batch"))


def data_parallel_group(mesh: config.Mesh | None, devices: Sequence[jax.Device] | None = None) -> DataParallelGroup:
    """Over `devices` (default: all of all processes), or on one device if the mesh has no layout. Raises UserError."""
    return DataParallelGroup(make_mesh_rules(mesh, devices) if mesh else None)


def check(sharding: MeshRules) -> None:
    """Raise UserError unless rows are split over all devices, and of the weights nothing but experts."""
    layout, mesh = sharding.rules, sharding.mesh
    everywhere = sharding.axes("activations", "batch")
    if sharding.size(everywhere) != mesh.size:
        over = ", ".join(axis for axis in mesh.axis_names if mesh.shape[axis] > 1 and axis not in everywhere)
        raise UserError(
            f"serving gives every device rows of its own, and layout {layout.name!r} splits something else "
            f"over {over}; leave those axes at 1"
        )
    if {axis for name, _ in layout.weights if name != "expert" for axis in sharding.axes("weights", name)}:
        raise UserError(
            f"serving splits experts and keeps all other weights whole, and layout {layout.name!r} splits "
            "more; take layout 'serve'"
        )


def validate_engine(on: DataParallelGroup, model: config.Model, limits: config.Serve, cache: config.Cache) -> None:
    """Raise UserError for experts that the devices do not divide, and for what an engine does on one device alone."""
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
