"""A config file for runs of several processes: the smallest model in which tokens travel and layers differ."""

from v4jax.config import Config, Data, Indexer, Model, MoE, Train


def get_config(arg: str = "") -> Config:
    """`arg` is the file of text to train on."""
    model = Model(
        vocab_size=2048,
        hidden_size=32,
        layer_types=("csa",),
        num_attention_heads=4,
        head_dim=16,
        qk_rope_head_dim=8,
        q_lora_rank=16,
        o_groups=2,
        o_lora_rank=8,
        sliding_window=8,
        compress_rate_hca=8,
        dtype="float32",
        max_position_embeddings=4096,
        num_nextn_predict_layers=0,
        indexer=Indexer(index_n_heads=4, index_head_dim=8, index_topk=2),
        moe=MoE(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, num_hash_layers=0),
    )
    train = Train(steps=20, batch_size=8, warmup=2, log_every=1, checkpoint_every=5, eval_rows=8, lr=5e-3, adam_lr=5e-3)
    return Config("micro", model, Data(source=arg, seq_len=32), train)
