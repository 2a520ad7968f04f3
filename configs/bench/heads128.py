"""83 million parameters: `small` with the 128 heads of V4-Pro, where attention is most of a long decode step.

V4-Flash and V4-Pro spend 8 and 16 times as many products on an entry that is attended (heads x head_dim x 2) as on one
that the indexer scores (its heads x its head_dim). `small` has 4, this config 256: what sparse reading can save shows
without the indexer's own cost. Read both tables together.
"""

from v4jax.config import Config, Data, HyperConnection, Indexer, Model, MoE, RoPE, Serve, Train


def get_config(arg: str = "") -> Config:
    """The benchmark model with many heads; no arguments."""
    model = Model(
        vocab_size=2048,
        hidden_size=512,
        layer_types=("swa", "csa", "csa", "csa", "csa", "csa", "csa", "hca"),
        num_attention_heads=128,
        head_dim=128,
        qk_rope_head_dim=16,
        q_lora_rank=128,
        o_groups=16,
        o_lora_rank=32,
        sliding_window=128,
        compress_rate_csa=4,
        compress_rate_hca=128,
        max_position_embeddings=1_048_576,
        num_nextn_predict_layers=0,
        dtype="float32",
        rope=RoPE(yarn_factor=16.0, yarn_original=65_536),
        indexer=Indexer(index_n_heads=4, index_head_dim=32, index_topk=64),
        moe=MoE(n_routed_experts=16, num_experts_per_tok=4, moe_intermediate_size=256, num_hash_layers=1),
        mhc=HyperConnection(),
    )
    return Config(
        name="heads128",
        model=model,
        data=Data(seq_len=512),
        train=Train(steps=2000, batch_size=4),
        serve=Serve(max_num_seqs=16, max_model_len=16_384, max_num_batched_tokens=1024),
    )
