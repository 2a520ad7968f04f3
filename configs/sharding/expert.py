"""Experts are sharded by device and tokens dispatched to them; all else is split as in `fsdp`, over both axes."""

from v4jax.config import ShardingRules


def get_sharding() -> ShardingRules:
    """The rule table."""
    return ShardingRules(
        "expert",
        fill="expert",
        weights=(
            ("expert", ("expert",)),
            ("expert_embed", ("fsdp",)),
            ("embed", ("fsdp", "expert")),
            ("o_group_in", ("fsdp", "expert")),
            ("q_rank_in", ("fsdp",)),
            ("head_dim_out", ("expert",)),
            ("index_dim_out", ("expert",)),
        ),
        activations=(("batch", ("slice", "data", "fsdp", "expert")),),
    )
