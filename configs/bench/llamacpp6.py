"""13.2 million parameters, six layers with 512-wide heads: llama.cpp's decoder of this family was timed on it.

Hidden size, heads, experts, layers and indexer are those of that timing; what it does not state (ranks, vocabulary,
groups) is chosen small, so that it weighs little.
"""

import dataclasses

from v4jax.config import Config, Indexer, load


def get_config(arg: str = "") -> Config:
    """The shape of llama.cpp's timing; no arguments."""
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
