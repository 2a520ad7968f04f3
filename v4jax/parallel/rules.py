"""From logical axes to mesh axes: how each array is split, by one rule table, and nothing guessed.

Parameters carry letters (`nn/linear.py`), letters have logical names (`core/axes.py`), a layout (`configs/sharding`)
says which mesh axes split a logical one. What cannot be meant is an error: a mesh axis twice in one array, a rule that
nothing follows, a mesh axis that splits nothing, a size that does not divide.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from v4jax import config
from v4jax.config import MESH_AXES
from v4jax.core.axes import ACTIVATION, LOGICAL, SPECIAL, logical
from v4jax.core.errors import UserError
from v4jax.parallel.mesh import make_mesh

_ACTIVE: contextvars.ContextVar[MeshRules | None] = contextvars.ContextVar("sharding", default=None)


@dataclass(frozen=True)
class MeshRules:
    """A mesh and the rules by which arrays lie on it.

    per_device: the program in force is already one device's (the body of a `shard_map` over all axes), arrays its
    parts.
    """

    mesh: Mesh
    rules: config.ShardingRules
    per_device: bool = False

    @property
    def platform(self) -> str:
        """Kind of the devices, "cpu", "gpu" or "tpu", which need not be the backend of this process."""
        return self.mesh.devices.flat[0].platform

    def axes(self, table: str, name: str) -> tuple[str, ...]:
        """Mesh axes larger than 1 that split the logical axis `name`; table: "weights" or "activations"."""
        return tuple(axis for axis in dict(getattr(self.rules, table)).get(name, ()) if self.mesh.shape[axis] > 1)

    def size(self, axes: Sequence[str]) -> int:
        """Devices along these axes together."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def weight(self, letters: str) -> PartitionSpec:
        """How a parameter of these letters is split, a stack axis in front not counted."""
        if len(letters) < 2:
            return PartitionSpec()
        return _spec([self.axes("weights", name) for name in logical(letters)])

    def activation(self, letters: str) -> PartitionSpec:
        """How an activation of these letters is split; letters that no rule can name are whole."""
        return _spec([self.axes("activations", ACTIVATION[x]) if x in ACTIVATION else () for x in letters])

    def named(self, spec: PartitionSpec) -> NamedSharding:
        """On this mesh."""
        return NamedSharding(self.mesh, spec)

    def parameters(self, letters: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, NamedSharding]:
        """Sharding of every parameter. Raises UserError for a clash or a size that the devices do not divide."""
        out = {}
        for name, axes in letters.items():
            spec = self.weight(axes)
            stacked = len(shapes[name]) - len(axes)
            full = (*(None,) * stacked, *spec)
            _check(self, name, full, ("layers",) * stacked + logical(axes), shapes[name])
            out[name] = self.named(PartitionSpec(*full))
        return out


def make_mesh_rules(mesh: config.Mesh, devices: Sequence[jax.Device] | None = None) -> MeshRules | None:
    """The mesh of a config with its rules, checked; None for a config without a layout. Raises UserError."""
    if not mesh.rules:
        return None
    layout = config.load_sharding(mesh.rules)
    validate_rules(layout)
    sharding = MeshRules(make_mesh(mesh, layout, devices), layout)
    used = {axis for _, axes in layout.weights + layout.activations for axis in axes}
    for axis, size in sharding.mesh.shape.items():
        if size > 1 and axis not in used:
            raise UserError(
                f"mesh.{axis} is {size}, but no rule of layout {layout.name!r} uses it; set it to 1, or "
                "take another layout"
            )
    return sharding


def validate_rules(layout: config.ShardingRules) -> None:
    """Raise UserError for a rule that means nothing: an unknown or repeated name, or a mesh axis twice in an array."""
    words = set(LOGICAL.values()) | {word for names in SPECIAL.values() for word in names.values()}
    for table, known in (("weights", words), ("activations", set(ACTIVATION.values()))):
        rules = getattr(layout, table)
        names = [name for name, _ in rules]
        for name, axes in rules:
            where = f"layout {layout.name!r}: {table} rule {name!r}"
            if name not in known:
                raise UserError(f"{where} follows no logical axis; one of {', '.join(sorted(known))}")
            if names.count(name) > 1:
                raise UserError(f"{where} is given twice; merge the two")
            if unknown := [axis for axis in axes if axis not in MESH_AXES]:
                raise UserError(f"{where} names the mesh axis {unknown[0]!r}; one of {', '.join(MESH_AXES)}")
            if not axes or len(set(axes)) < len(axes):
                raise UserError(f"{where} needs mesh axes, each once, not {axes}")
    activations = [axis for _, axes in layout.activations for axis in axes]
    if twice := [axis for axis in activations if activations.count(axis) > 1]:
        raise UserError(f"layout {layout.name!r}: mesh axis {twice[0]!r} splits two axes of an activation; drop one")
    if layout.fill not in MESH_AXES:
        raise UserError(f"layout {layout.name!r}: fill is {layout.fill!r}; one of {', '.join(MESH_AXES)}")


def validate_used(layout: config.ShardingRules, letters: Sequence[str]) -> None:
    """Raise UserError for a clash in a parameter of these letters, or a rule that none of them follows."""
    rules, followed = dict(layout.weights), set()
    for axes in letters:
        if len(axes) > 1:
            names = [name for name in logical(axes) if name in rules]
            followed |= set(names)
            taken: dict[str, str] = {}
            for name in names:
                for axis in rules[name]:
                    if axis in taken:
                        raise UserError(
                            f"layout {layout.name!r}: mesh axis {axis!r} splits both {taken[axis]!r} and "
                            f"{name!r} of a parameter {axes}; drop it from one rule"
                        )
                    taken[axis] = name
    if unused := [name for name in rules if name not in followed]:
        raise UserError(f"layout {layout.name!r}: no parameter of this model follows the rule {unused[0]!r}; remove it")


@contextlib.contextmanager
def use_rules(sharding: MeshRules | None) -> Iterator[None]:
    """Inside, `constrain` and `active` follow these rules; entered while a program is traced."""
    token = _ACTIVE.set(sharding)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def current_rules() -> MeshRules | None:
    """The rules in force, or None."""
    return _ACTIVE.get()


def constrain(x: jax.Array, letters: str) -> jax.Array:
    """The activation `x`, split as the rules in force say; without rules, or inside of one device, `x` itself."""
    sharding = _ACTIVE.get()
    if sharding is None or sharding.per_device:
        return x
    return jax.lax.with_sharding_constraint(x, sharding.named(sharding.activation(letters)))


def _spec(axes: Sequence[tuple[str, ...]]) -> PartitionSpec:
    return PartitionSpec(*(None if not names else names[0] if len(names) == 1 else names for names in axes))


def _check(sharding: MeshRules, name: str, spec: tuple, names: tuple[str, ...], shape: tuple[int, ...]) -> None:
    for axes, word, size in zip(spec, names, shape, strict=False):
        split = (axes,) if isinstance(axes, str) else axes or ()
        if size % sharding.size(split):
            product = " x ".join(f"mesh.{axis}={sharding.mesh.shape[axis]}" for axis in split)
            raise UserError(
                f"{name}: its axis {word!r} of {size} is not a multiple of {product}; "
                "make one of them smaller, or take another layout"
            )
