"""From a config and a set of devices to a mesh with the six axes."""

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


def sizes(mesh: config.Mesh, layout: config.ShardingRules, devices: int) -> tuple[int, ...]:
    """Devices along each of MESH_AXES; raises UserError if they cannot make up `devices`."""
    size = {axis: getattr(mesh, axis) for axis in MESH_AXES}
    named = ", ".join(f"mesh.{axis}={n}" for axis, n in size.items() if n > 1) or "no axis"
    if size[layout.fill] == 1:
        others = math.prod(size.values())
        if devices % others:
            raise UserError(f"{devices} devices cannot be split by {named}; their product must divide {devices}")
        size[layout.fill] = devices // others
    if math.prod(size.values()) != devices:
        raise UserError(
            f"{named} make {math.prod(size.values())} devices, but there are {devices}; "
            f"leave mesh.{layout.fill} at 1 to give it what the others leave"
        )
    return tuple(size.values())


def make_mesh(mesh: config.Mesh, layout: config.ShardingRules, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (default: all of all processes), every axis Auto: the compiler places collectives.

    Neighbours on the last axes are neighbours in the machine. The axis `slice` follows the devices' slice index where
    they have more than one, and is cut out of the order of processes elsewhere.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = sizes(mesh, layout, len(devices))
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
