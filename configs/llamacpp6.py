"""13.2 million parameters, six layers with 512-wide heads: llama.cpp's decoder of this family was timed on it.

Hidden size, heads, experts, layers and indexer are those of that timing; what it does not state (ranks, vocabulary,
groups) is chosen small, so that it weighs little.
"""

from v4jax.config import Config, Data, HyperConnection, Indexer, Model, Moe, Rope, Serve, Train


def get_config(arg: str = "") -> Config:
    """The peer's shape; no arguments."""
    model = Model(
        vocab_size=2048,
        hidden_size=256,
        schedule=("swa", "swa", "csa", "hca", "csa", "hca"),
        heads=8,
        head_dim=512,
        rope_dim=64,
        q_rank=64,
        o_groups=4,
        o_rank=64,
        window=128,
        csa_ratio=4,
        hca_ratio=128,
        max_positions=1_048_576,
        mtp_layers=0,
        dtype="float32",
        rope=Rope(yarn_factor=16.0, yarn_original=65_536),
        indexer=Indexer(heads=8, head_dim=128, topk=64),
        moe=Moe(experts=8, active=2, inner=128, hash_layers=1),
        mhc=HyperConnection(),
    )
    return Config(
        name="llamacpp6",
        model=model,
        data=Data(seq_len=512),
        train=Train(steps=2000, batch_size=4),
        serve=Serve(max_batch=8, max_seq_len=32_768, prefill_chunk=1024),
    )
