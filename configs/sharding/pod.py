"""All axes at once, for the largest models: experts by device, their hidden size by fsdp, their width by tensor.

`context` splits tokens alone: it is for more devices than rows, where weights are split enough already.
"""

from v4jax.config import ShardingRules


def get_sharding() -> ShardingRules:
    """The rule table."""
    return ShardingRules(
        "pod",
        fill="fsdp",
        weights=(
            ("expert", ("expert",)),
            ("expert_embed", ("fsdp",)),
            ("embed", ("fsdp", "expert")),
            ("o_group_in", ("fsdp", "expert")),
            ("q_rank_in", ("fsdp",)),
            ("head_dim_out", ("expert",)),
            ("index_dim_out", ("expert",)),
            ("heads", ("tensor",)),
            ("o_group", ("tensor",)),
            ("index_heads", ("tensor",)),
            ("mlp", ("tensor",)),
            ("expert_mlp", ("tensor",)),
            ("vocab", ("tensor",)),
        ),
        activations=(
            ("batch", ("slice", "data", "fsdp", "expert")),
            ("token", ("context",)),
            ("vocab", ("tensor",)),
        ),
    )
