"""83 million parameters: `small` with the 128 heads of V4-Pro, where attention is most of a long decode step.

A query multiplies num_attention_heads x head_dim x 2 numbers to attend an entry, and index_n_heads x index_head_dim to
score one. The ratio of the two is 8 in V4-Flash, 16 in V4-Pro, 4 in `small` and 256 here, so this config shows what
sparse attention saves where scoring costs little. v4jax/tools/bench/README.md has its table beside that of `small`.
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
