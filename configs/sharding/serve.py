"""For decoding: experts stay where they are, all else is whole, or split by heads and widths, and never gathered."""

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
