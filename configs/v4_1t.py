"""The flagship shape: one trillion parameters, 32 billion of them active for a token, a context of 1M tokens.

No weights of it were published; the shape is chosen here, between V4-Flash (284B / 13B) and V4-Pro (1573B / 49B), by
the relations that both keep and so that every large axis splits into powers of two. Counts:
tests/models/test_param_count.py.
"""

from v4jax.config import Config, Data, HyperConnection, Indexer, Model, MoE, RoPE, Serve, Train


def get_config(arg: str = "") -> Config:
    """The flagship; no arguments."""
    model = Model(
        vocab_size=129_280,  # the family's tokenizer
        # 3 x 2^11, between 4096 and 7168: splits into 2048 shards, where 7168 = 7 x 2^10 splits into 1024.
        hidden_size=6144,
        # Heads stay 512 wide (the released KV entry); 96 x 512 is 8 times the hidden size, as in both released models.
        num_attention_heads=96,
        head_dim=512,
        qk_rope_head_dim=64,
        q_lora_rank=1536,  # a quarter of the hidden size, as in Flash
        o_groups=12,  # 8 heads and so 4096 inputs a group, as in both
        o_lora_rank=1024,
        sliding_window=128,
        max_position_embeddings=1_048_576,
        rms_norm_eps=1e-6,
        bos_id=0,
        eos_id=1,
        # 51 layers by the rule of Pro: two HCA layers first, then CSA and HCA in turn, CSA last. Depth is what is left
        # to set the total: a layer holds 19.33B in routed experts, 51 of them 985.7B, with all else 1003.1B.
        layer_types=("hca", "hca") + ("csa", "hca") * 24 + ("csa",),
        compress_rate_csa=4,
        compress_rate_hca=128,
        num_nextn_predict_layers=1,
        # 1M tokens as published: trained positions of 64K, stretched 16 times on compressed layers.
        rope=RoPE(
            rope_theta=10_000.0,
            compress_rope_theta=160_000.0,
            yarn_factor=16.0,
            yarn_original=65_536,
            yarn_beta_fast=32.0,
            yarn_beta_slow=1.0,
        ),
        # As in Pro: 1024 of the 262,144 entries at 1M tokens.
        indexer=Indexer(index_n_heads=64, index_head_dim=128, index_topk=1024),
        # Sparsity of Pro (6 of 384 = 8 of 512 = 1.56 %), in experts a third narrower: 512 is a power of two, so any
        # expert axis up to 512 splits them, and 2048 = 16 x 128 fills the matrix units of every listed chip at up to 16
        # tensor shards. Eight routed experts make 15.4B active, attention 11.8B, the head 0.8B; two shared ones (Pro's
        # 3072 would be one and a half) bring the sum to 32.1B.
        moe=MoE(
            n_routed_experts=512,
            num_experts_per_tok=8,
            moe_intermediate_size=2048,
            n_shared_experts=2,
            num_hash_layers=3,
            routed_scaling_factor=2.5,
            swiglu_limit=10.0,
        ),
        mhc=HyperConnection(hc_mult=4, hc_sinkhorn_iters=20, hc_eps=1e-6),
        dtype="bfloat16",
        modalities=("text",),
        engram_layers=(),
    )
    return Config(
        name="v4_1t",
        model=model,
        data=Data(seq_len=4096),
        # Between the rates of Flash (2.7e-4) and Pro (2.0e-4), by the logarithm of active parameters: 2.2e-4.
        train=Train(lr=2.2e-4, adam_lr=2.2e-4, final_lr=0.1, warmup=2000, batch_size=1024, scan=True, remat=True),
        serve=Serve(max_num_seqs=64, max_model_len=1_048_576, max_num_batched_tokens=8192),
    )
