"""The tokens of a row split over devices, for rows too long for one; weights split as in `fsdp`, over both axes."""

from v4jax.config import ShardingRules


def get_sharding() -> ShardingRules:
    """The rule table."""
    return ShardingRules(
        "context",
        fill="context",
        weights=(
            ("embed", ("fsdp", "context")),
            ("expert_embed", ("fsdp", "context")),
            ("q_rank_in", ("fsdp", "context")),
            ("o_group_in", ("fsdp", "context")),
        ),
        activations=(("batch", ("slice", "data", "fsdp")), ("token", ("context",))),
    )
