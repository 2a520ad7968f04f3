"""Sharding rules map the logical axes of each array to mesh axes. Nothing is inferred outside the rule table.

Parameters carry axis letters (`nn/linear.py`). Letters have logical names (`core/axes.py`). A set of rules
(`configs/sharding`) lists the mesh axes that split each logical axis.

Four mistakes in them are errors: a mesh axis that splits two axes of one array, a rule that no parameter uses, a
mesh axis larger than 1 that splits nothing, and an axis size that is not a multiple of its number of shards.
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
from v4jax.core.target_device import use_target_device
from v4jax.parallel.mesh import make_mesh

_ACTIVE: contextvars.ContextVar[MeshRules | None] = contextvars.ContextVar("sharding", default=None)


@dataclass(frozen=True)
class MeshRules:
    """A mesh and the rules that shard arrays over it.

    Attributes:
        mesh: the device mesh, with the axes MESH_AXES.
        rules: the rules, two tables from logical axes to mesh axes.
        per_device: True while the body of a `shard_map` over all mesh axes is traced. Its arrays are already one
            device's shards, so `constrain` must not split them again.
    """

    mesh: Mesh
    rules: config.ShardingRules
    per_device: bool = False

    @property
    def platform(self) -> str:
        """Platform of the mesh devices: "cpu", "gpu" or "tpu". It can differ from this process's default backend."""
        return self.mesh.devices.flat[0].platform

    def axes(self, table: str, name: str) -> tuple[str, ...]:
        """Return the mesh axes larger than 1 that split a logical axis.

        Args:
            table: "weights" or "activations".
            name: the logical axis. An axis without a rule is not split.
        """
        return tuple(axis for axis in dict(getattr(self.rules, table)).get(name, ()) if self.mesh.shape[axis] > 1)

    def size(self, axes: Sequence[str]) -> int:
        """Return the product of the sizes of these mesh axes, which is the number of shards."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def weight(self, letters: str) -> PartitionSpec:
        """Return the spec of a parameter with these axis letters; one-dimensional parameters are replicated.

        The letters do not include the leading axis of stacked layers, and neither does the spec.
        """
        if len(letters) < 2:
            return PartitionSpec()
        return _spec([self.axes("weights", name) for name in logical(letters)])

    def activation(self, letters: str) -> PartitionSpec:
        """Return the spec of an activation with these axis letters. Letters outside ACTIVATION are not split."""
        return _spec([self.axes("activations", ACTIVATION[x]) if x in ACTIVATION else () for x in letters])

    def named(self, spec: PartitionSpec) -> NamedSharding:
        """Return the NamedSharding of a spec on this mesh."""
        return NamedSharding(self.mesh, spec)

    def parameters(self, letters: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, NamedSharding]:
        """Return the sharding of every parameter by name.

        Args:
            letters: axis letters of each parameter, without the axis of stacked layers.
            shapes: shape of each parameter. Axes in front of the lettered ones stack layers and are not split.

        Raises:
            UserError: an axis size is not a multiple of the number of devices that split it.
        """
        out = {}
        for name, axes in letters.items():
            spec = self.weight(axes)
            stacked = len(shapes[name]) - len(axes)
            full = (*(None,) * stacked, *spec)
            _check(self, name, full, ("layers",) * stacked + logical(axes), shapes[name])
            out[name] = self.named(PartitionSpec(*full))
        return out


def make_mesh_rules(mesh: config.Mesh, devices: Sequence[jax.Device] | None = None) -> MeshRules | None:
    """Build the mesh of a config and load its sharding rules.

    Args:
        mesh: sizes of the mesh axes and the name of sharding rules.
        devices: devices of the mesh. None takes all devices of all processes.

    Returns:
        The mesh and its rules, or None if the config names no rules.

    Raises:
        UserError: the rules are invalid (`validate_rules`), the axis sizes do not fit the devices (`make_mesh`), or a
            mesh axis larger than 1 appears in no rule.
    """
    if not mesh.rules:
        return None
    sharding_rules = config.load_sharding(mesh.rules)
    validate_rules(sharding_rules)
    sharding = MeshRules(make_mesh(mesh, sharding_rules, devices), sharding_rules)
    used = {axis for _, axes in sharding_rules.weights + sharding_rules.activations for axis in axes}
    for axis, size in sharding.mesh.shape.items():
        if size > 1 and axis not in used:
            raise UserError(
                f"mesh.{axis} is {size}, but no rule of {sharding_rules.name!r} uses it; set it to 1, or "
                "take other rules"
            )
    return sharding


def validate_rules(sharding_rules: config.ShardingRules) -> None:
    """Check sharding rules without a model.

    Raises:
        UserError: a rule names an unknown logical axis, repeats a name, names an unknown mesh axis, or has none or a
            repeated one; two activation rules share a mesh axis; or `fill` is no mesh axis.
    """
    title = f"sharding rules {sharding_rules.name!r}"
    words = set(LOGICAL.values()) | {word for names in SPECIAL.values() for word in names.values()}
    for table, known in (("weights", words), ("activations", set(ACTIVATION.values()))):
        rules = getattr(sharding_rules, table)
        names = [name for name, _ in rules]
        for name, axes in rules:
            where = f"{title}: {table} rule {name!r}"
            if name not in known:
                raise UserError(f"{where} follows no logical axis; one of {', '.join(sorted(known))}")
            if names.count(name) > 1:
                raise UserError(f"{where} is given twice; merge the two")
            if unknown := [axis for axis in axes if axis not in MESH_AXES]:
                raise UserError(f"{where} names the mesh axis {unknown[0]!r}; one of {', '.join(MESH_AXES)}")
            if not axes or len(set(axes)) < len(axes):
                raise UserError(f"{where} needs mesh axes, each once, not {axes}")
    activations = [axis for _, axes in sharding_rules.activations for axis in axes]
    if twice := [axis for axis in activations if activations.count(axis) > 1]:
        raise UserError(f"{title}: mesh axis {twice[0]!r} splits two axes of an activation; drop one")
    if sharding_rules.fill not in MESH_AXES:
        raise UserError(f"{title}: fill is {sharding_rules.fill!r}; one of {', '.join(MESH_AXES)}")


def validate_used(sharding_rules: config.ShardingRules, letters: Sequence[str]) -> None:
    """Check the weight rules against the parameters of a model.

    Args:
        sharding_rules: the rules.
        letters: axis letters of every parameter. Parameters with fewer than two letters are not split and not checked.

    Raises:
        UserError: a mesh axis splits two axes of one parameter, or no parameter has the axis of a rule.
    """
    rules, followed = dict(sharding_rules.weights), set()
    title = f"sharding rules {sharding_rules.name!r}"
    for axes in letters:
        if len(axes) > 1:
            names = [name for name in logical(axes) if name in rules]
            followed |= set(names)
            taken: dict[str, str] = {}
            for name in names:
                for axis in rules[name]:
                    if axis in taken:
                        raise UserError(
                            f"{title}: mesh axis {axis!r} splits both {taken[axis]!r} and "
                            f"{name!r} of a parameter {axes}; drop it from one rule"
                        )
                    taken[axis] = name
    if unused := [name for name in rules if name not in followed]:
        raise UserError(f"{title}: no parameter of this model follows the rule {unused[0]!r}; remove it")


@contextlib.contextmanager
def use_rules(sharding: MeshRules | None) -> Iterator[None]:
    """Make these rules the current ones: `constrain` and `current_rules` use them inside the context.

    Operations select their implementation for the devices of the mesh (`core.target_device`).

    The context must be active while a program is traced, because constraints become part of the traced program.
    """
    token = _ACTIVE.set(sharding)
    try:
        with use_target_device(sharding and sharding.mesh.devices.flat[0]):
            yield
    finally:
        _ACTIVE.reset(token)


def current_rules() -> MeshRules | None:
    """Return the rules of the innermost `use_rules`, or None outside of one."""
    return _ACTIVE.get()


def constrain(x: jax.Array, letters: str) -> jax.Array:
    """Constrain the sharding of the activation `x` by the current rules.

    Without current rules, or with `per_device` ones, `x` is returned as it is.
    """
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
                "make one of them smaller, or take other rules"
            )
