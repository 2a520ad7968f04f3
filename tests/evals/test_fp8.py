"""The quality of a cache in fewer bits: what is compared, and what happens past a bound."""

import jax
import numpy as np
import pytest

from tests.golden import weights
from v4jax import evals
from v4jax.core.check import UserError
from v4jax.evals import fp8

pytestmark = pytest.mark.slow

MODEL = weights.config(schedule=("csa", "hca"), indexer=weights.Indexer(heads=16, head_dim=32, topk=3))


@pytest.fixture(scope="module")
def case():
    return weights.build(MODEL, weights.random_flat(MODEL, 3)), weights.tokens(MODEL, (2, 40))


def test_the_reference_reads_what_the_forward_computes_up_to_its_rounding(case):
    net, ids = case
    logits = jax.jit(fp8._logits, static_argnums=2)
    full = np.asarray(weights.full(net, ids)[0])
    np.testing.assert_allclose(logits(net, ids, "model"), full, rtol=0, atol=1e-4 * full.std())
    gap = {name: np.abs(np.asarray(logits(net, ids, name)) - full).mean() for name in ("bf16", "fp8", "fp8_fp4")}
    assert 0 < gap["bf16"] < gap["fp8"] < gap["fp8_fp4"]


def test_kl_and_recall(case):
    net, ids = case
    kl, same, change, kept, picked = (np.asarray(a) for a in fp8.compare(net, ids, "fp8_fp4"))
    assert kl.shape == (2, 40) and (kl > -1e-6).all() and kl.max() > 1e-6
    assert same.shape == (2, 40) and change.shape == (2, 39)
    choices = sum((t + 1) // MODEL.csa_ratio > 3 for t in range(40))
    assert picked.tolist() == [2 * 3 * choices] and 0.5 < kept[0] / picked[0] < 1


def test_bounds_are_read_and_judged(monkeypatch, tmp_path):
    assert fp8._bounds("top1=0.5,kl_mean=1")["top1"] == 0.5 and fp8._bounds("")["kl_p99"] == 2e-2
    for wrong in ("top2=1", "top1", "top1=x"):
        with pytest.raises(UserError, match="is not NAME=NUMBER"):
            fp8._bounds(wrong)
    record = {"metric": "top1", "value": 0.4, "bound": 0.99, "holds": False}
    monkeypatch.setattr(fp8, "run", lambda checkpoint, layout="fp8": [record])
    out = tmp_path / "x.json"
    with pytest.raises(UserError, match=r"beyond its bounds: top1 0.4 \(bound 0.99\)"):
        evals.run("fp8", "DIR", json=str(out))
    assert out.is_file()
    with pytest.raises(UserError, match="suite 'fp8' has no --depth"):
        evals.run("fp8", "DIR", depth=3)
