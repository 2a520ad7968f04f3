"""Rules for decoding. Experts are sharded by device, other weights are replicated or split by heads and widths.

No weight is gathered in a step.
"""

from v4jax.config import ShardingRules


def get_sharding() -> ShardingRules:
    """The rule table."""
    return ShardingRules(
        "serve",
        fill="expert",
        weights=(
            ("expert", ("expert",)),
            ("heads", ("tensor",)),
            ("o_group", ("tensor",)),
            ("index_heads", ("tensor",)),
            ("mlp", ("tensor",)),
            ("expert_mlp", ("tensor",)),
            ("vocab", ("tensor",)),
        ),
        activations=(("batch", ("slice", "data", "expert")), ("vocab", ("tensor",))),
    )
