"""0.24 million parameters, trained to find needles in haystacks: sparse FP8 reading far beyond the window."""

from v4jax.config import Config, Data, HyperConnection, Indexer, Model, MoE, Serve, Train


def get_config(arg: str = "") -> Config:
    """The retrieval model; no arguments."""
    model = Model(
        vocab_size=256,
        hidden_size=64,
        layer_types=("swa", "csa"),
        num_attention_heads=4,
        head_dim=64,
        qk_rope_head_dim=4,
        q_lora_rank=64,
        o_groups=1,
        o_lora_rank=64,
        sliding_window=8,
        compress_rate_csa=4,
        max_position_embeddings=1_048_576,
        num_nextn_predict_layers=0,
        dtype="float32",
        kv_qdq=True,
        indexer=Indexer(index_n_heads=4, index_head_dim=32, index_topk=32),
        moe=MoE(n_routed_experts=2, num_experts_per_tok=1, moe_intermediate_size=64, num_hash_layers=0),
        mhc=HyperConnection(hc_mult=2, hc_sinkhorn_iters=4),
    )
    return Config(
        name="needle",
        model=model,
        data=Data(source="needle", seq_len=96, questions=12),
        train=Train(steps=1200, batch_size=32, lr=0.005, adam_lr=0.003, checkpoint_every=200, eval_rows=64),
        serve=Serve(max_num_seqs=8, max_model_len=1_048_576, max_num_batched_tokens=1024),
    )
