"""The one model of the tests: every kind of layer and every feature, small enough to compile in seconds.

A test that needs another model names the fields in which its model differs. `tests/golden/weights.py` has the variant
whose logits are stored, and `tests/serve/engine_harness.py` the one that engines serve.
"""

from v4jax.config import Indexer, Model, MoE


def micro(**changes) -> Model:
    """Return the micro model, with `changes` to fields of `config.Model`.

    Its vocabulary of 2,048 ids is that of the built-in tokenizer.
    """
    fields = dict(
        vocab_size=2048,
        hidden_size=32,
        layer_types=("swa", "csa", "hca"),
        num_attention_heads=2,
        head_dim=16,
        qk_rope_head_dim=8,
        q_lora_rank=16,
        o_groups=2,
        o_lora_rank=8,
        sliding_window=8,
        compress_rate_csa=4,
        compress_rate_hca=8,
        dtype="float32",
        max_position_embeddings=4096,
        indexer=Indexer(index_n_heads=4, index_head_dim=8, index_topk=2),
        moe=MoE(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, num_hash_layers=1),
    )
    return Model(**fields | changes)


def one_layer(kind: str, **changes) -> Model:
    """Return the micro model with one layer of one kind, without hash routing and MTP: the quickest to compile."""
    moe = MoE(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, num_hash_layers=0)
    return micro(**dict(layer_types=(kind,), num_nextn_predict_layers=0, moe=moe) | changes)


def divisible(**changes) -> Model:
    """Return a one-layer micro model with 4 heads and 8 experts: every mesh of eight devices divides its axes."""
    moe = MoE(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, num_hash_layers=0)
    fields = dict(layer_types=("csa",), num_attention_heads=4, num_nextn_predict_layers=0, moe=moe)
    return micro(**fields | changes)
