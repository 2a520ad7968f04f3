"""83 million parameters: `small` with the 128 heads of V4-Pro, where attention is most of a long decode step.

V4-Flash and V4-Pro spend 8 and 16 times as many products on an entry that is attended (heads x head_dim x 2) as on one
that the indexer scores (its heads x its head_dim). `small` has 4, this config 256: what sparse reading can save shows
without the indexer's own cost. Read both tables together.
"""

import dataclasses

from v4jax.config import Config, load


def get_config(arg: str = "") -> Config:
    """The benchmark model with many heads; no arguments."""
    small = load("small")
    model = dataclasses.replace(
        small.model,
        layer_types=("swa", "csa", "csa", "csa", "csa", "csa", "csa", "hca"),
        num_attention_heads=128,
        o_groups=16,
        o_lora_rank=32,
        indexer=dataclasses.replace(small.model.indexer, index_n_heads=4),
    )
    return dataclasses.replace(small, name="heads128", model=model)
