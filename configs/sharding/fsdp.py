"""Weights and optimizer state split over the devices that split the batch, gathered layer by layer (ZeRO 3).

One axis of every matrix is split: the hidden size where it has one, else the axis it reads.
"""

from v4jax.config import ShardingRules


def get_sharding() -> ShardingRules:
    """The rule table."""
    return ShardingRules(
        "fsdp",
        fill="fsdp",
        weights=(
            ("embed", ("fsdp",)),
            ("expert_embed", ("fsdp",)),
            ("q_rank_in", ("fsdp",)),
            ("o_group_in", ("fsdp",)),
        ),
        activations=(("batch", ("slice", "data", "fsdp")),),
    )
