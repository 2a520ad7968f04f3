"""Parameter counts against the published ones, by group (spec 1.2)."""

import dataclasses
import math

import pytest

from tests.golden import weights
from v4jax import config
from v4jax.checkpoint import param_mapping
from v4jax.config import MoE
from v4jax.models.param_count import count_parameters

# In billions, to the digits that were published or derived from the released files (spec 1.2).
PUBLISHED = {
    "v4_flash": {
        "total": "284.33",
        "active": "13.27",
        "embedding": "0.5295",
        "head": "0.5295",
        "attention": "5.086",
        "routed experts": "277.025",
        "shared experts": "1.082",
        "router": "0.045",
        "mhc": "0.034",
    },
    "v4_pro": {
        "total": "1573.0",
        "active": "48.85",
        "embedding": "0.9267",
        "head": "0.9267",
        "attention": "19.465",
        "routed experts": "1547.396",
        "shared experts": "4.030",
        "router": "0.168",
        "mhc": "0.084",
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_the_published_ones(name):
    counts = count_parameters(config.load(name).model)
    got = {"total": counts.total, "active": counts.active, **counts.by_group}
    for group, want in PUBLISHED[name].items():
        digits = len(want.split(".")[1])
        assert f"{got[group] / 1e9:.{digits}f}" == want, group
    assert sum(counts.by_group.values()) - counts.by_group["mtp"] == counts.total


def test_the_flagship_has_a_trillion_parameters_and_32_billion_active():
    counts, m = count_parameters(config.load("v4_1t").model), config.load("v4_1t").model
    assert counts.total == pytest.approx(1e12, rel=0.01) and counts.active == pytest.approx(32e9, rel=0.02)
    assert m.max_position_embeddings == 2**20
    assert m.num_hidden_layers == 51
    assert m.num_attention_heads * m.head_dim == 8 * m.hidden_size
    assert (m.modalities, m.engram_layers) == (("text",), ())
    pro = config.load("v4_pro").model  # the sparsity and the groups are Pro's
    assert m.moe.num_experts_per_tok / m.moe.n_routed_experts == pro.moe.num_experts_per_tok / pro.moe.n_routed_experts
    assert m.num_attention_heads // m.o_groups == pro.num_attention_heads // pro.o_groups == 8


@pytest.mark.parametrize("name", PUBLISHED)
def test_mtp_by_arithmetic(name):
    """One window layer with bias routing, two projections, three norms and a head mix (spec 5.1)."""
    m = config.load(name).model
    D, X = m.hidden_size, m.mhc.hc_mult
    attention = D * m.q_lora_rank + m.q_lora_rank * m.num_attention_heads * m.head_dim + D * m.head_dim
    attention += m.num_attention_heads * m.head_dim * m.o_lora_rank + m.o_groups * m.o_lora_rank * D
    attention += m.q_lora_rank + m.head_dim + m.num_attention_heads
    experts = 3 * D * m.moe.moe_intermediate_size * (m.moe.n_routed_experts + 1) + (D + 1) * m.moe.n_routed_experts
    coefficients = X * X + 2 * X
    mhc = 2 * (coefficients * X * D + coefficients + 3) + X * X * D + X + 1
    norms = 5 * D
    assert count_parameters(m).by_group["mtp"] == attention + experts + mhc + norms + 2 * D * D


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_are_those_of_the_released_files(name):
    """Weights of a checkpoint, tensor by tensor, add up to the same number (hash tables are no parameters)."""
    m = config.load(name).model
    sizes = [t for t in param_mapping.tensors(m).values() if t.role != "index"]
    counts = count_parameters(m)
    assert sum(math.prod(t.shape) for t in sizes) == counts.total + counts.by_group["mtp"]


def test_the_two_models_differ_where_published():
    flash, pro = config.load("v4_flash").model, config.load("v4_pro").model
    assert [flash.layer_types.count(kind) for kind in ("swa", "csa", "hca")] == [2, 21, 20]
    assert [pro.layer_types.count(kind) for kind in ("swa", "csa", "hca")] == [0, 30, 31]
    assert flash.layer_types[:5] == ("swa", "swa", "csa", "hca", "csa") and flash.layer_types[-1] == "csa"
    assert pro.layer_types[:5] == ("hca", "hca", "csa", "hca", "csa") and pro.layer_types[-1] == "csa"
    for m in (flash, pro):
        assert (m.rope.rope_theta, m.rope.compress_rope_theta) == (10_000, 160_000)
        assert (m.rope.yarn_factor, m.rope.yarn_original) == (16, 65_536)
        assert m.num_nextn_predict_layers == 1
        assert m.dtype == "bfloat16"
        assert not m.kv_qdq
        assert m.alignment == m.sliding_window == 128


def test_active_counts_a_tokens_own_experts():
    dense = weights.config(
        moe=MoE(n_routed_experts=4, num_experts_per_tok=4, moe_intermediate_size=16, num_hash_layers=1)
    )
    sparse = dataclasses.replace(dense, moe=dataclasses.replace(dense.moe, num_experts_per_tok=1))
    one = 3 * dense.hidden_size * 16
    a, b = count_parameters(dense), count_parameters(sparse)
    assert a.total == b.total and a.active - b.active == 3 * one * dense.num_hidden_layers
    assert a.active == a.total - dense.vocab_size * dense.hidden_size and a.by_group["mtp"] == 0
