"""2.4 million parameters with every feature on: trains on a laptop in minutes."""

from v4jax.config import Config, Data, HyperConnection, Indexer, Model, Moe, Rope, Serve, Train


def get_config(arg: str = "") -> Config:
    """The laptop model; no arguments."""
    model = Model(
        vocab_size=2048,
        hidden_size=128,
        schedule=("swa", "csa", "hca", "csa"),
        heads=4,
        head_dim=64,
        rope_dim=16,
        q_rank=64,
        o_groups=2,
        o_rank=64,
        window=32,
        csa_ratio=4,
        hca_ratio=16,
        max_positions=1_048_576,
        dtype="float32",
        kv_qdq=True,  # a cache in FP8 then stores the numbers of training: costs nothing, `eval --suite=fp8` holds
        rope=Rope(yarn_factor=16.0, yarn_original=65_536),
        indexer=Indexer(heads=16, head_dim=32, topk=16),
        moe=Moe(experts=8, active=2, inner=96, hash_layers=1),
        mhc=HyperConnection(),
    )
    return Config(
        name="tiny",
        model=model,
        data=Data(seq_len=256),
        train=Train(steps=260, batch_size=8, lr=0.016, adam_lr=0.048, warmup=20, checkpoint_every=100, eval_rows=0),
        serve=Serve(max_batch=8, max_seq_len=4096, prefill_chunk=256),
    )
