"""83 million parameters: `small` with the 128 heads of V4-Pro, where attention is most of a long decode step.

V4-Flash and V4-Pro spend 8 and 16 times as many products on an entry that is attended (heads x head_dim x 2) as on one
that the indexer scores (its heads x its head_dim). `small` has 4, this config 256: what sparse reading can save shows
without the indexer's own cost. Read both tables together.
"""

from v4jax.config import Config, Data, HyperConnection, Indexer, Model, Moe, Rope, Serve, Train


def get_config(arg: str = "") -> Config:
    """The benchmark model with many heads; no arguments."""
    model = Model(
        vocab_size=2048,
        hidden_size=512,
        schedule=("swa", "csa", "csa", "csa", "csa", "csa", "csa", "hca"),
        heads=128,
        head_dim=128,
        rope_dim=16,
        q_rank=128,
        o_groups=16,
        o_rank=32,
        window=128,
        csa_ratio=4,
        hca_ratio=128,
        max_positions=1_048_576,
        mtp_layers=0,
        dtype="float32",
        rope=Rope(yarn_factor=16.0, yarn_original=65_536),
        indexer=Indexer(heads=4, head_dim=32, topk=64),
        moe=Moe(experts=16, active=4, inner=256, hash_layers=1),
        mhc=HyperConnection(),
    )
    return Config(
        name="heads128",
        model=model,
        data=Data(seq_len=512),
        train=Train(steps=2000, batch_size=4),
        serve=Serve(max_batch=16, max_seq_len=16_384, prefill_chunk=1024),
    )
