"""Router: scores, bias, hash tables, balance loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.golden import weights
from v4jax.config import MoE
from v4jax.nn.linear import Buffer
from v4jax.nn.router import HashRouter, TopKRouter, balance_loss, hash_table

MODEL = weights.config(
    hidden_size=16,
    moe=MoE(n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=4, routed_scaling_factor=2.5),
)
X = np.random.RandomState(0).standard_normal((2, 5, 16)).astype(np.float32)
TOKENS = weights.tokens(MODEL, (2, 5))


call = jax.jit(lambda router, x, tokens: router(x, tokens))


def _router(cls=TopKRouter, bias=None):
    router = cls(MODEL, nnx.Rngs(0))
    router.weight = nnx.Param(jnp.asarray(np.random.RandomState(1).standard_normal((16, 8)), jnp.float32))
    if bias is not None:
        router.bias = Buffer(jnp.asarray(bias, jnp.float32))
    return router


def _scores(router):
    return np.sqrt(np.log1p(np.exp(X.astype(np.float64) @ np.asarray(router.weight[...], np.float64))))


def test_weights_are_normalized_scores_times_the_scale():
    router = _router()
    picks, w, scores = call(router, X, TOKENS)
    want = _scores(router)
    np.testing.assert_allclose(scores, want, rtol=1e-5)
    np.testing.assert_array_equal(picks, np.argsort(-want, -1)[..., :3])
    chosen = np.take_along_axis(want, np.asarray(picks), -1)
    np.testing.assert_allclose(w, 2.5 * chosen / chosen.sum(-1, keepdims=True), rtol=1e-5)


def test_bias_moves_the_choice_and_never_the_weight():
    router = _router(bias=[0, 0, 0, 0, 0, 0, 0, 50.0])
    picks, w, scores = call(router, X, TOKENS)
    want = _scores(router)
    np.testing.assert_allclose(scores, want, rtol=1e-5)  # the balance loss sees scores without bias
    assert (np.asarray(picks)[..., 0] == 7).all()
    chosen = np.take_along_axis(want, np.asarray(picks), -1)
    np.testing.assert_allclose(w, 2.5 * chosen / chosen.sum(-1, keepdims=True), rtol=1e-5)


def test_hash_layers_choose_by_token_and_weigh_by_score():
    router = _router(HashRouter)
    picks, w, scores = call(router, X, TOKENS)
    np.testing.assert_array_equal(picks, np.asarray(router.table[...])[TOKENS])
    chosen = np.take_along_axis(_scores(router), np.asarray(picks), -1)
    np.testing.assert_allclose(w, 2.5 * chosen / chosen.sum(-1, keepdims=True), rtol=1e-5)
    gradient = jax.jit(jax.grad(lambda x: router(x, TOKENS)[1][..., 0].sum()))(X)
    assert np.abs(gradient).max() > 1e-3


@pytest.mark.parametrize(
    "vocab, experts, active", [(2048, 8, 2), (2048, 16, 4), (129_280, 256, 6), (129_280, 384, 6), (64, 4, 4)]
)
def test_hash_tables_are_distinct_and_balanced(vocab, experts, active):
    table = np.asarray(hash_table(vocab, experts, active))
    assert table.shape == (vocab, active) and table.dtype == np.int32 and 0 <= table.min() <= table.max() < experts
    assert (np.diff(np.sort(table, 1), axis=1) > 0).all()
    load = np.bincount(table.ravel(), minlength=experts) / (vocab * active / experts)
    assert 0.8 < load.min() and load.max() < 1.2
    np.testing.assert_array_equal(table, hash_table(vocab, experts, active))


def test_far_out_logits_give_finite_weights_and_gradients():
    """softplus(-100) is 0 in float32, and the root of 0 has no derivative."""
    router = _router()
    router.weight = nnx.Param(jnp.asarray(np.where(np.arange(8) < 5, -200.0, 200.0) * np.ones((16, 1)), jnp.float32))
    x = jnp.ones((1, 2, 16))

    @jax.jit
    def both(x):
        out, pull = jax.vjp(lambda x: router(x, TOKENS[:1, :2])[1:], x)
        return *out, pull(out)[0]

    for sign in (1.0, -1.0):
        w, scores, gradient = both(sign * x)
        assert np.isfinite(w).all() and np.isfinite(scores).all() and np.isfinite(gradient).all()
        np.testing.assert_allclose(w.sum(-1), 2.5, rtol=1e-5)


def test_balance_loss_is_the_formula():
    """Spec 3.3, row by row, padding left out; the fraction of chosen experts carries no gradient."""
    rng = np.random.RandomState(2)
    scores, picks = rng.random_sample((3, 6, 8)) + 0.1, np.argsort(rng.random_sample((3, 6, 8)), -1)[..., :3]
    valid = np.ones((3, 6), bool)
    valid[1, 4:], valid[2] = False, False

    def by_hand(scores):
        rows, load = [], np.zeros(8)
        for b in range(3):
            seen = np.flatnonzero(valid[b])
            total = 0.0
            for e in range(8):
                hits = sum(e in picks[b, t] for t in seen)
                load[e] += hits
                share = sum(scores[b, t, e] / scores[b, t].sum() for t in seen) / max(len(seen), 1)
                total += 8 / (3 * max(len(seen), 1)) * hits * share
            rows.append(total)
        return np.mean(rows), load

    loss = lambda s: balance_loss(s, jnp.asarray(picks), jnp.asarray(valid))
    got, load = loss(jnp.asarray(scores, jnp.float32))
    want, want_load = by_hand(scores)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_array_equal(load, want_load)
    gradient = np.asarray(jax.jit(jax.grad(lambda s: loss(s)[0]))(scores.astype(np.float32)))
    step = np.zeros_like(scores)
    step[0, 2, 5] = 1e-5
    slope = (by_hand(scores + step)[0] - by_hand(scores - step)[0]) / 2e-5
    np.testing.assert_allclose(gradient[0, 2, 5], slope, rtol=1e-3)
    assert not gradient[~valid].any() and gradient[valid].any()


def test_even_load_is_the_smallest_loss():
    even = jnp.ones((1, 8, 8))
    picks = (jnp.arange(8)[:, None] + jnp.arange(3)) % 8
    np.testing.assert_allclose(balance_loss(even, picks[None], None)[0], 1.0, rtol=1e-6)
    uneven = even.at[..., :3].set(4.0)
    assert balance_loss(uneven, jnp.broadcast_to(jnp.arange(3), (1, 8, 3)), None)[0] > 1.5
