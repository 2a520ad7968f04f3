"""The scores that can be looked at are those by which the layer chooses."""

import jax
import numpy as np
import pytest

import v4jax
from tests.golden import weights
from v4jax.core.errors import UserError
from v4jax.kernels import indexer
from v4jax.nn import csa


@pytest.mark.parametrize("kv_qdq", [False, True])
def test_scores_are_those_of_the_forward(monkeypatch, kv_qdq):
    model = weights.config(layer_types=("swa", "csa", "csa"), kv_qdq=kv_qdq)
    net, ids = weights.build(model, weights.random_flat(model, 3)), weights.tokens(model, (2, 32))
    seen = []
    monkeypatch.setattr(csa, "score", lambda *args: seen.append(indexer.score(*args)) or seen[-1])
    with jax.disable_jit():
        net(ids)
    scores = v4jax.indexer_scores(net, ids)
    assert scores.shape == (2, 32, 32 // model.compress_rate_csa) and float(np.ptp(scores)) > 0
    np.testing.assert_allclose(scores, seen[0], rtol=1e-4, atol=1e-5)


def test_a_model_without_an_indexer_is_refused():
    model = weights.config(layer_types=("swa", "hca"))
    net = weights.build(model, weights.random_flat(model, 3))
    with pytest.raises(UserError, match="a model with a csa layer"):
        v4jax.indexer_scores(net, weights.tokens(model, (1, 16)))
