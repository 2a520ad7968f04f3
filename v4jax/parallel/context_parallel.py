"""Rows of which every device has some tokens: what passes from a part to the next, and what all parts gather.

A compiler left to itself sends whole rows. So what reads across parts says here what it needs: a few rows of the part
before, or all of something small.
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
    """The split of the tokens by the rules in force."""

    sharding: MeshRules

    @property
    def axes(self) -> tuple[str, ...]:
        """Mesh axes that split the tokens."""
        return self.sharding.axes("activations", "token")

    def check(self, tokens: int, alignment: int, window: int) -> None:
        """Raise UserError unless rows of so many tokens fall into parts of whole compression windows, each with at
        least the tokens of a sliding window."""
        count = self.sharding.size(self.axes)
        part, rest = divmod(tokens, count)
        if rest or part % alignment or part < window:
            raise UserError(
                f"rows of {tokens} tokens do not fall into {count} parts: each must be a multiple of "
                f"{alignment} tokens, and at least {window}; make mesh.context smaller"
            )

    def run(self, function: Callable, *arguments):
        """function(*arguments) as `alone`, but that parts may ask for what `before` and `whole` give."""
        return _run(self.sharding, function, arguments)

    def halo_left(self, tree, count: int, first):
        """Inside of `run`: the last `count` rows of the part before, and in the first part `first`, a tree like it."""
        steps = [(i, i + 1) for i in range(self.sharding.size(self.axes) - 1)]
        is_first = jax.lax.axis_index(self.axes) == 0
        move = lambda a, empty: jnp.where(is_first, empty, jax.lax.ppermute(a[:, -count:], self.axes, steps))
        return jax.tree.map(move, tree, first)

    def all_gather(self, tree):
        """Inside of `run`: arrays [B, T, ...] of all parts, one after another."""
        return jax.tree.map(lambda a: jax.lax.all_gather(a, self.axes, axis=1, tiled=True), tree)


def active_context_shards() -> ContextShards | None:
    """How tokens are split, None if they are not, or if the program in force is already one device's."""
    sharding = current_rules()
    split = sharding is not None and not sharding.per_device and sharding.axes("activations", "token")
    return ContextShards(sharding) if split else None


def shard_local(function: Callable, *arguments):
    """function(*arguments) of each device's rows and tokens. Arguments and results are trees of arrays [B, T, ...], or
    with another multiple of the parts in place of T; other axes may be split over the rest of the mesh."""
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
