"""DeepSeek-V4-Pro: 1.6 trillion parameters, 49 billion of them active for a token."""

from v4jax.config import Config, Data, HyperConnection, Indexer, Model, Moe, Rope, Serve, Train


def get_config(arg: str = "") -> Config:
    """The published shape; no arguments."""
    model = Model(
        # Size, heads, ranks, window, ids: spec 1.1, from the config.json of the release.
        vocab_size=129_280,
        hidden_size=7168,
        heads=128,
        head_dim=512,
        rope_dim=64,
        q_rank=1536,
        o_groups=16,
        o_rank=1024,
        window=128,
        max_positions=1_048_576,
        norm_eps=1e-6,
        bos_id=0,
        eos_id=1,
        # Layers: spec 2.8, compress_ratios 128,128,(4,128)x29,4, draft 0; one MTP layer as in the preview (5.1).
        schedule=("hca", "hca") + ("csa", "hca") * 29 + ("csa",),
        csa_ratio=4,
        hca_ratio=128,
        mtp_layers=1,
        # Rotation: spec 1.1 and 2.3; YaRN on compressed layers only.
        rope=Rope(
            theta=10_000.0, compress_theta=160_000.0,
            yarn_factor=16.0, yarn_original=65_536, yarn_beta_fast=32.0, yarn_beta_slow=1.0,
        ),
        # Indexer, experts, hyper-connections: spec 1.1.
        indexer=Indexer(heads=64, head_dim=128, topk=1024),
        moe=Moe(experts=384, active=6, inner=3072, shared=1, hash_layers=3, route_scale=2.5, swiglu_limit=10.0),
        mhc=HyperConnection(streams=4, sinkhorn_iters=20, eps=1e-6),
        dtype="bfloat16",
    )  # fmt: skip
    return Config(
        name="v4_pro",
        model=model,
        # Training: peak rate, its last value and the warm-up of spec 8.3; the first stage's rows of 4K.
        data=Data(seq_len=4096),
        train=Train(lr=2.0e-4, adam_lr=2.0e-4, final_lr=0.1, warmup=2000, batch_size=1024, scan=True, remat=True),
        serve=Serve(max_batch=64, max_seq_len=1_048_576, prefill_chunk=8192),
    )
