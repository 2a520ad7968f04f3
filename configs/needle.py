"""0.24 million parameters, trained to find needles in haystacks: sparse FP8 reading far beyond the window."""

from v4jax.config import Config, Data, HyperConnection, Indexer, Model, Moe, Serve, Train


def get_config(arg: str = "") -> Config:
    """The retrieval model; no arguments."""
    model = Model(
        vocab_size=256,
        hidden_size=64,
        schedule=("swa", "csa"),
        heads=4,
        head_dim=64,
        rope_dim=4,
        q_rank=64,
        o_groups=1,
        o_rank=64,
        window=8,
        csa_ratio=4,
        max_positions=1_048_576,
        mtp_layers=0,
        dtype="float32",
        kv_qdq=True,
        indexer=Indexer(heads=4, head_dim=32, topk=32),
        moe=Moe(experts=2, active=1, inner=64, hash_layers=0),
        mhc=HyperConnection(streams=2, sinkhorn_iters=4),
    )
    return Config(
        name="needle",
        model=model,
        data=Data(source="needle", seq_len=96, questions=12),
        train=Train(steps=1200, batch_size=32, lr=0.005, adam_lr=0.003, checkpoint_every=200, eval_rows=64),
        serve=Serve(max_batch=8, max_seq_len=1_048_576, prefill_chunk=1024),
    )
