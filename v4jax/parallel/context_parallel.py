"""Context parallelism: each device holds some tokens of every row and exchanges only what its neighbors need.

Left to itself, the compiler sends unsharded rows. Code that reads across shards therefore asks explicitly, for a few
tokens of the preceding shard (`halo_left`) or for all shards of a small array (`all_gather`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from v4jax.core.errors import UserError
from v4jax.parallel.rules import MeshRules, current_rules


@dataclass(frozen=True)
class ContextShards:
    """The token axis as the current rules shard it over the mesh.

    Attributes:
        sharding: the mesh and its rules.
    """

    sharding: MeshRules

    @property
    def axes(self) -> tuple[str, ...]:
        """Mesh axes that shard the token axis."""
        return self.sharding.axes("activations", "token")

    def check(self, tokens: int, alignment: int, window: int) -> None:
        """Check that rows of `tokens` tokens can be sharded.

        Args:
            tokens: tokens of a row.
            alignment: each shard must be a multiple of this many tokens, so that it holds complete compression
                windows.
            window: each shard must have at least this many tokens, the size of the sliding window.

        Raises:
            UserError: the shards would be unequal, unaligned or too short.
        """
        count = self.sharding.size(self.axes)
        part, rest = divmod(tokens, count)
        if rest or part % alignment or part < window:
            raise UserError(
                f"rows of {tokens} tokens do not fall into {count} parts: each must be a multiple of "
                f"{alignment} tokens, and at least {window}; make mesh.context smaller"
            )

    def run(self, function: Callable, *arguments):
        """Run `function` on each device's shards like `shard_local`; it may call `halo_left` and `all_gather`."""
        return _run(self.sharding, function, arguments)

    def halo_left(self, tree, count: int, first):
        """Return the last tokens of the preceding shard. Call it inside `run` only.

        Args:
            tree: pytree of arrays [B, T, ...], this device's shards.
            count: number of tokens to fetch.
            first: pytree like the result, returned on the first shard, which has no preceding one.

        Returns:
            Pytree of arrays [B, count, ...].
        """
        steps = [(i, i + 1) for i in range(self.sharding.size(self.axes) - 1)]
        is_first = jax.lax.axis_index(self.axes) == 0
        move = lambda a, empty: jnp.where(is_first, empty, jax.lax.ppermute(a[:, -count:], self.axes, steps))
        return jax.tree.map(move, tree, first)

    def all_gather(self, tree):
        """Concatenate the shards [B, T, ...] of all devices along the token axis. Call it inside `run` only."""
        return jax.tree.map(lambda a: jax.lax.all_gather(a, self.axes, axis=1, tiled=True), tree)


def active_context_shards() -> ContextShards | None:
    """Return the current sharding of the token axis.

    None if there are no current rules, if they do not split the token axis, or if they are `per_device`.
    """
    sharding = current_rules()
    if sharding is None or sharding.per_device or not sharding.axes("activations", "token"):
        return None
    return ContextShards(sharding)


def shard_local(function: Callable, *arguments):
    """Run `function` on each device's shard of the batch and token axes, by `shard_map`.

    Without current rules, with `per_device` ones, or if they split neither axis, `function` is called directly.

    Args:
        function: maps shards to shards.
        *arguments: pytrees of arrays [B, T, ...]. The second axis may have another size that is a multiple of the
            number of token shards. Further axes may be sharded over the remaining mesh axes.

    Returns:
        The result of `function`, pytrees of arrays of the same form.
    """
    sharding = current_rules()
    if sharding is None or sharding.per_device or not any(sharding.activation("BT")):
        return function(*arguments)
    return _run(sharding, function, arguments)


def _run(sharding: MeshRules, function: Callable, arguments):
    spec = sharding.activation("BT")
    split = {*sharding.axes("activations", "batch"), *sharding.axes("activations", "token")}
    mapped = jax.shard_map(
        function, mesh=sharding.mesh, in_specs=spec, out_specs=spec, axis_names=split, check_vma=False
    )
    return mapped(*arguments)
