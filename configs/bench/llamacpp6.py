"""13.2 million parameters in six layers with 512-wide heads: the model of suite `generate`.

Hidden size, heads, experts, layers and indexer are those of a model of this family that was timed with llama.cpp. Its
other sizes (ranks, vocabulary, groups) are unknown; they are small here, so that they affect the time little. The times
of v4jax are in v4jax/tools/bench/README.md.
"""

import dataclasses

from v4jax.config import Config, Indexer, load


def get_config(arg: str = "") -> Config:
    """The model of suite `generate`; no arguments."""
    small = load("small")
    model = dataclasses.replace(
        small.model,
        hidden_size=256,
        layer_types=("swa", "swa", "csa", "hca", "csa", "hca"),
        head_dim=512,
        qk_rope_head_dim=64,
        q_lora_rank=64,
        o_lora_rank=64,
        indexer=Indexer(index_n_heads=8, index_head_dim=128, index_topk=64),
        moe=dataclasses.replace(small.model.moe, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=128),
    )
    serve = dataclasses.replace(small.serve, max_num_seqs=8, max_model_len=32_768)
    return dataclasses.replace(small, name="llamacpp6", model=model, serve=serve)
