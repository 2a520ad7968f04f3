"""64 million parameters, for benchmarks on one machine."""

from v4jax.config import Config, Data, HyperConnection, Indexer, Model, Moe, Rope, Serve, Train


def get_config(arg: str = "") -> Config:
    """The benchmark model; no arguments."""
    model = Model(
        vocab_size=2048,
        hidden_size=512,
        schedule=("swa", "csa", "hca", "csa", "hca", "csa", "hca", "csa"),
        heads=8,
        head_dim=128,
        rope_dim=16,
        q_rank=128,
        o_groups=4,
        o_rank=128,
        window=128,
        csa_ratio=4,
        hca_ratio=128,
        max_positions=1_048_576,
        mtp_layers=0,
        dtype="float32",
        rope=Rope(yarn_factor=16.0, yarn_original=65_536),
        indexer=Indexer(heads=16, head_dim=32, topk=64),
        moe=Moe(experts=16, active=4, inner=256, hash_layers=1),
        mhc=HyperConnection(),
    )
    return Config(
        name="small",
        model=model,
        data=Data(seq_len=512),
        train=Train(steps=2000, batch_size=4),
        serve=Serve(max_batch=16, max_seq_len=16_384, prefill_chunk=1024),
    )
