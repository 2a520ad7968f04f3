"""DeepSeek-V4-Pro: 1.6 trillion parameters, 49 billion of them active for a token."""

from v4jax.config import Config, Data, HyperConnection, Indexer, Model, MoE, RoPE, Serve, Train


def get_config(arg: str = "") -> Config:
    """The published shape; no arguments."""
    model = Model(
        # Size, heads, ranks, window, ids: spec 1.1, from the config.json of the release.
        vocab_size=129_280,
        hidden_size=7168,
        num_attention_heads=128,
        head_dim=512,
        qk_rope_head_dim=64,
        q_lora_rank=1536,
        o_groups=16,
        o_lora_rank=1024,
        sliding_window=128,
        max_position_embeddings=1_048_576,
        rms_norm_eps=1e-6,
        bos_id=0,
        eos_id=1,
        # Layers: spec 2.8, compress_ratios 128,128,(4,128)x29,4, draft 0; one MTP layer as in the preview (5.1).
        layer_types=("hca", "hca") + ("csa", "hca") * 29 + ("csa",),
        compress_rate_csa=4,
        compress_rate_hca=128,
        num_nextn_predict_layers=1,
        # Rotation: spec 1.1 and 2.3; YaRN on compressed layers only.
        rope=RoPE(
            rope_theta=10_000.0,
            compress_rope_theta=160_000.0,
            yarn_factor=16.0,
            yarn_original=65_536,
            yarn_beta_fast=32.0,
            yarn_beta_slow=1.0,
        ),
        # Indexer, experts, hyper-connections: spec 1.1.
        indexer=Indexer(index_n_heads=64, index_head_dim=128, index_topk=1024),
        moe=MoE(
            n_routed_experts=384,
            num_experts_per_tok=6,
            moe_intermediate_size=3072,
            n_shared_experts=1,
            num_hash_layers=3,
            routed_scaling_factor=2.5,
            swiglu_limit=10.0,
        ),
        mhc=HyperConnection(hc_mult=4, hc_sinkhorn_iters=20, hc_eps=1e-6),
        dtype="bfloat16",
    )
    return Config(
        name="v4_pro",
        model=model,
        # Training: peak rate, its last value and the warm-up of spec 8.3; the first stage's rows of 4K.
        data=Data(seq_len=4096),
        train=Train(lr=2.0e-4, adam_lr=2.0e-4, final_lr=0.1, warmup=2000, batch_size=1024, scan=True, remat=True),
        serve=Serve(max_num_seqs=64, max_model_len=1_048_576, max_num_batched_tokens=8192),
    )
