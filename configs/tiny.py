"""2.4 million parameters with every feature on: trains on a laptop in minutes."""

from v4jax.config import Config, Data, HyperConnection, Indexer, Model, MoE, RoPE, Serve, Train


def get_config(arg: str = "") -> Config:
    """The laptop model; no arguments."""
    model = Model(
        vocab_size=2048,
        hidden_size=128,
        layer_types=("swa", "csa", "hca", "csa"),
        num_attention_heads=4,
        head_dim=64,
        qk_rope_head_dim=16,
        q_lora_rank=64,
        o_groups=2,
        o_lora_rank=64,
        sliding_window=32,
        compress_rate_csa=4,
        compress_rate_hca=16,
        max_position_embeddings=1_048_576,
        dtype="float32",
        kv_qdq=True,  # training rounds entries as an FP8 cache does, so such a cache changes no number
        rope=RoPE(yarn_factor=16.0, yarn_original=65_536),
        indexer=Indexer(index_n_heads=16, index_head_dim=32, index_topk=16),
        moe=MoE(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=96, num_hash_layers=1),
        mhc=HyperConnection(),
    )
    return Config(
        name="tiny",
        model=model,
        data=Data(seq_len=256),
        train=Train(steps=260, batch_size=8, lr=0.016, adam_lr=0.048, warmup=20, checkpoint_every=100, eval_rows=0),
        serve=Serve(max_num_seqs=8, max_model_len=4096, max_num_batched_tokens=256),
    )
