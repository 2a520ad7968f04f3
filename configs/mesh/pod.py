"""All axes at once, for the largest models: experts by device, their hidden size by fsdp, their width by tensor."""

from v4jax.config import Layout


def get_layout() -> Layout:
    """The rule table."""
    shared = ("fsdp", "expert", "context")
    return Layout(
        "pod",
        fill="fsdp",
        weights=(
            ("expert", ("expert",)),
            ("expert_embed", ("fsdp", "context")),
            ("embed", shared),
            ("q_rank_in", shared),
            ("o_group_in", shared),
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
