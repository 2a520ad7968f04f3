"""The layout of layers in memory, and the flat per-layer names of checkpoints.

`stacks` groups consecutive layers into stacks of a repeated pattern. The arrays of a stack that repeats have a leading
axis and are scanned, so a program for 61 layers is as long as one for 4. A stack with one repeat has no leading axis.
Small models are faster unrolled: a scan copies each layer's weights out of the stack, which slows a decode step.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from v4jax import config
from v4jax.core.errors import UserError
from v4jax.core.layer_spec import LayerSpec


class LayerStack(NamedTuple):
    """Consecutive layers of a repeated pattern, from `first` to `first + repeats * len(pattern) - 1`.

    Attributes:
        first: index of the first layer in the model.
        pattern: the layers that repeat.
        repeats: number of times that the pattern occurs.
    """

    first: int
    pattern: tuple[LayerSpec, ...]
    repeats: int

    def layer(self, position: int, repeat: int) -> int:
        """Return the model's layer index of the layer at `position` of the pattern in repeat `repeat`."""
        return self.first + repeat * len(self.pattern) + position


def stacks(model: config.Model, scan: bool) -> list[LayerStack]:
    """Group the layers of a model into stacks.

    From each first layer the longest repetition of a pattern of one or two layers becomes a stack. Without `scan`
    each layer is a stack of its own.
    """
    layers, specs, i = model.layers, [], 0
    while i < len(layers):
        best = LayerStack(i, layers[i : i + 1], 1)
        for period in (1, 2) if scan else ():
            pattern, repeats = layers[i : i + period], 1
            while layers[i + repeats * period : i + (repeats + 1) * period] == pattern:
                repeats += 1
            if repeats > 1 and repeats * period > best.repeats * len(best.pattern):
                best = LayerStack(i, pattern, repeats)
        specs.append(best)
        i += best.repeats * len(best.pattern)
    return specs


def to_layer_dict(tree: nnx.State, specs: list[LayerStack]) -> dict[str, jax.Array]:
    """Convert an in-memory tree to {"layers.3.attn.kv": array, ...}, with stacks split into layers."""
    flat = {}
    for path, array in _leaves(tree).items():
        if path[0] != "stacks":
            flat[".".join(path)] = array
            continue
        spec, position, name = specs[int(path[1])], int(path[2]), ".".join(path[3:])
        for repeat in range(spec.repeats):
            flat[f"layers.{spec.layer(position, repeat)}.{name}"] = array[repeat] if spec.repeats > 1 else array
    return flat


def from_layer_dict(flat: Mapping[str, jax.Array], abstract: nnx.State, specs: list[LayerStack]) -> nnx.State:
    """Convert {"layers.3.attn.kv": array, ...} to the in-memory tree; the inverse of `to_layer_dict`.

    Args:
        flat: arrays by name.
        abstract: a tree of the same structure as the result.
        specs: the stacks of the model.

    Raises:
        UserError: an array is missing.
    """

    def array(name):
        if name not in flat:
            raise UserError(f"parameter {name} is missing; give all parameters of this very model")
        return flat[name]

    def find(path):
        path = tuple(str(p) for p in path)
        if path[0] != "stacks":
            return array(".".join(path))
        spec, position, name = specs[int(path[1])], int(path[2]), ".".join(path[3:])
        layers = [array(f"layers.{spec.layer(position, repeat)}.{name}") for repeat in range(spec.repeats)]
        return jnp.stack(layers) if spec.repeats > 1 else layers[0]

    found = {path: variable.replace(find(path)) for path, variable in nnx.to_flat_state(abstract)}
    return nnx.from_flat_state(found)


def to_stacked_dict(tree: nnx.State) -> dict[str, jax.Array]:
    """Convert an in-memory tree to {"stacks.0.1.attn.kv": array, ...}, with layers left stacked."""
    return {".".join(path): array for path, array in _leaves(tree).items()}


def from_stacked_dict(arrays: Mapping[str, jax.Array], abstract: nnx.State) -> nnx.State:
    """Convert the result of `to_stacked_dict` back to a tree with the structure of `abstract`."""
    leaves = nnx.to_flat_state(abstract)
    return nnx.from_flat_state({path: leaf.replace(arrays[".".join(map(str, path))]) for path, leaf in leaves})


def layers_of(name: str, specs: list[LayerStack]) -> list[int] | None:
    """Return the layer indices that the stacked array `name` holds, in order, or None outside the stacks."""
    path = name.split(".")
    if path[0] != "stacks":
        return None
    spec = specs[int(path[1])]
    return [spec.layer(int(path[2]), repeat) for repeat in range(spec.repeats)]


def _leaves(tree: nnx.State) -> dict[tuple[str, ...], jax.Array]:
    return {tuple(str(p) for p in path): variable[...] for path, variable in nnx.to_flat_state(tree)}
