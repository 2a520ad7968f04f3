"""13.2 million parameters, six layers with 512-wide heads: llama.cpp's decoder of this family was timed on it.

Hidden size, heads, experts, layers and indexer are those of that timing; what it does not state (ranks, vocabulary,
groups) is chosen small, so that it weighs little.
"""

from v4jax.config import Config, Data, HyperConnection, Indexer, Model, MoE, RoPE, Serve, Train


def get_config(arg: str = "") -> Config:
    """The peer's shape; no arguments."""
    model = Model(
        vocab_size=2048,
        hidden_size=256,
        layer_types=("swa", "swa", "csa", "hca", "csa", "hca"),
        num_attention_heads=8,
        head_dim=512,
        qk_rope_head_dim=64,
        q_lora_rank=64,
        o_groups=4,
        o_lora_rank=64,
        sliding_window=128,
        compress_rate_csa=4,
        compress_rate_hca=128,
        max_position_embeddings=1_048_576,
        num_nextn_predict_layers=0,
        dtype="float32",
        rope=RoPE(yarn_factor=16.0, yarn_original=65_536),
        indexer=Indexer(index_n_heads=8, index_head_dim=128, index_topk=64),
        moe=MoE(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=128, num_hash_layers=1),
        mhc=HyperConnection(),
    )
    return Config(
        name="llamacpp6",
        model=model,
        data=Data(seq_len=512),
        train=Train(steps=2000, batch_size=4),
        serve=Serve(max_num_seqs=8, max_model_len=32_768, max_num_batched_tokens=1024),
    )
