"""Build a JAX mesh with the six axes MESH_AXES from a config and a set of devices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from v4jax import config
from v4jax.config import MESH_AXES
from v4jax.core.errors import UserError


def sizes(mesh: config.Mesh, sharding_rules: config.ShardingRules, devices: int) -> tuple[int, ...]:
    """Return the size of each of MESH_AXES.

    Args:
        mesh: the configured sizes.
        sharding_rules: its `fill` axis takes the remaining devices if its configured size is 1.
        devices: number of devices.

    Raises:
        UserError: the product of the sizes is not `devices`.
    """
    size = {axis: getattr(mesh, axis) for axis in MESH_AXES}
    named = ", ".join(f"mesh.{axis}={n}" for axis, n in size.items() if n > 1) or "no axis"
    if size[sharding_rules.fill] == 1:
        others = math.prod(size.values())
        if devices % others:
            raise UserError(f"{devices} devices cannot be split by {named}; their product must divide {devices}")
        size[sharding_rules.fill] = devices // others
    if math.prod(size.values()) != devices:
        raise UserError(
            f"{named} make {math.prod(size.values())} devices, but there are {devices}; "
            f"leave mesh.{sharding_rules.fill} at 1 to give it what the others leave"
        )
    return tuple(size.values())


def make_mesh(
    mesh: config.Mesh, sharding_rules: config.ShardingRules, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Build the mesh. Every axis has type Auto, so the compiler inserts the collectives.

    Devices that are neighbors along the last axes are neighbors in the machine. If the devices have several slice
    indices, the axis `slice` follows them. Otherwise it is cut from the order of processes.

    Args:
        mesh: the configured sizes.
        sharding_rules: names the axis that takes the remaining devices.
        devices: devices of the mesh. None takes all devices of all processes.

    Raises:
        UserError: the sizes do not fit the number of devices or of slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = sizes(mesh, sharding_rules, len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        if shape[0] != slices:
            raise UserError(f"mesh.slice is {shape[0]}, but there are {slices} slices; set mesh.slice={slices}")
        grid = mesh_utils.create_hybrid_device_mesh((1, *shape[1:]), (slices, 1, 1, 1, 1, 1), devices)
    elif devices[0].platform == "tpu":
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        grid = np.array(devices).reshape(shape)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
