"""The quality of a cache in fewer bits: what is compared, and what happens past a bound."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from tests.golden import weights
from v4jax import config, evals
from v4jax.core.errors import UserError
from v4jax.evals import kv_quant
from v4jax.models.transformer import Transformer

pytestmark = pytest.mark.slow

MODEL = weights.config(
    layer_types=("csa", "hca"), indexer=weights.Indexer(index_n_heads=16, index_head_dim=32, index_topk=3)
)


@pytest.fixture(scope="module")
def case():
    return weights.build(MODEL, weights.random_flat(MODEL, 3)), weights.tokens(MODEL, (2, 40))


def test_the_reference_reads_what_the_forward_computes_up_to_its_rounding(case):
    net, ids = case
    logits = jax.jit(kv_quant._logits, static_argnums=2)
    full = np.asarray(weights.full(net, ids)[0])
    np.testing.assert_allclose(logits(net, ids, "auto"), full, rtol=0, atol=1e-4 * full.std())
    gap = {name: np.abs(np.asarray(logits(net, ids, name)) - full).mean() for name in ("bf16", "fp8", "fp8_fp4")}
    assert 0 < gap["bf16"] < gap["fp8"] < gap["fp8_fp4"]


def test_kl_and_recall(case):
    net, ids = case
    kl, same, change, kept, picked = (np.asarray(a) for a in kv_quant.compare(net, ids, "fp8_fp4"))
    assert kl.shape == (2, 40) and (kl > -1e-6).all() and kl.max() > 1e-6
    assert same.shape == (2, 40) and change.shape == (2, 39)
    choices = sum((t + 1) // MODEL.compress_rate_csa > 3 for t in range(40))
    assert picked.tolist() == [2 * 3 * choices] and 0.5 < kept[0] / picked[0] < 1


@pytest.mark.parametrize("layout", ["fp8", "fp8_fp4"])
def test_the_quickstarts_preset_loses_nothing_to_a_cache_in_fewer_bits(layout):
    """It is trained as it is served: its forward rounds as these caches do, whatever its weights are."""
    model = config.load("tiny").model
    net = Transformer(dataclasses.replace(model, vocab_size=64), nnx.Rngs(0))
    kl, same, _, kept, picked = (
        np.asarray(a) for a in kv_quant.compare(net, weights.tokens(net.config, (1, 96)), layout)
    )
    assert np.abs(kl).max() < 1e-6 and same.all() and kept.tolist() == picked.tolist() and picked[0] > 0


def test_bounds_are_read_and_judged(monkeypatch, tmp_path):
    assert kv_quant._bounds("top1=0.5,kl_mean=1")["top1"] == 0.5 and kv_quant._bounds("")["kl_p99"] == 2e-2
    for wrong in ("top2=1", "top1", "top1=x"):
        with pytest.raises(UserError, match="is not NAME=NUMBER"):
            kv_quant._bounds(wrong)
    record = {"metric": "top1", "value": 0.4, "bound": 0.99, "holds": False}
    monkeypatch.setattr(kv_quant, "run", lambda checkpoint, kv_cache_dtype="fp8": [record])
    out = tmp_path / "x.json"
    with pytest.raises(UserError, match=r"beyond its bounds: top1 0.4 \(bound 0.99\)"):
        evals.run("kv_quant", "DIR", json=str(out))
    assert out.is_file()
    with pytest.raises(UserError, match="suite 'kv_quant' has no --depth"):
        evals.run("kv_quant", "DIR", depth=3)
