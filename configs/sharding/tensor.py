"""Heads, output groups, expert widths and vocabulary split: devices of a fast network share every token."""

from v4jax.config import ShardingRules


def get_sharding() -> ShardingRules:
    """The rule table."""
    return ShardingRules(
        "tensor",
        fill="tensor",
        weights=(
            ("heads", ("tensor",)),
            ("o_group", ("tensor",)),
            ("index_heads", ("tensor",)),
            ("mlp", ("tensor",)),
            ("expert_mlp", ("tensor",)),
            ("vocab", ("tensor",)),
        ),
        activations=(("batch", ("slice", "data")), ("vocab", ("tensor",))),
    )
