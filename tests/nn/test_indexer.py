"""Indexer: visibility of entries, and its loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.golden import weights
from v4jax.models.transformer import full_batch
from v4jax.nn.attention import index_loss
from v4jax.nn.indexer import causal_mask
from v4jax.nn.kv_cache_interface import NoCache


@pytest.mark.parametrize("ratio", [2, 4, 16])
def test_the_token_that_completes_a_window_sees_its_entry(ratio):
    got = causal_mask(jnp.arange(50)[None], ratio, 0, 12)[0]
    for t in range(50):
        complete = [i for i in range(12) if (i + 1) * ratio - 1 <= t]  # entry i is there after token (i + 1) r - 1
        assert np.flatnonzero(got[t]).tolist() == complete


@pytest.mark.parametrize("kind, ratio", [("csa", 4), ("hca", 8)])
def test_an_attention_layer_sees_an_entry_from_its_last_token_on(kind, ratio):
    """With a raw window of one token, the first token of a window can only arrive through the entry."""
    model = weights.config(layer_types=(kind,), sliding_window=1, compress_rate_hca=8)
    attn = weights.build(model, weights.random_flat(model, 0)).stacks[0][0].attn
    run = jax.jit(lambda attn, x: attn(x, full_batch(jnp.zeros(x.shape[:2], jnp.int32)), NoCache())[0])
    x = np.random.RandomState(1).standard_normal((1, 3 * ratio, model.hidden_size)).astype(np.float32)
    other = x.copy()
    other[:, ratio] += 1  # the first token of window 1
    moved = np.abs(np.asarray(run(attn, other)) - np.asarray(run(attn, x))).max(-1)[0] > 1e-5
    assert np.flatnonzero(moved).tolist()[:2] == [ratio, 2 * ratio - 1]


def test_loss_is_the_divergence_from_the_attention_mass():
    rng = np.random.RandomState(0)
    scores, mass = rng.standard_normal((2, 3, 7)), rng.random_sample((2, 3, 7))
    mask = rng.random_sample((2, 3, 7)) > 0.4
    mask[0, 0], mass[0, 1, 2] = False, 0.0  # a query that reads nothing; an entry without mass
    mass, hidden = mass * mask, np.where(mask, scores, -np.inf)
    want = np.zeros((2, 3))
    for b, t in np.ndindex(2, 3):
        seen = np.flatnonzero(mask[b, t])
        if len(seen):
            own = np.exp(scores[b, t, seen]) / np.exp(scores[b, t, seen]).sum()
            target = mass[b, t, seen] / mass[b, t, seen].sum()
            want[b, t] = sum(p * np.log(p / q) for p, q in zip(target, own, strict=True) if p > 0)
    arguments = [jnp.asarray(a, jnp.float32) for a in (hidden, mass)]

    @jax.jit
    def both(scores, mass):
        out, pull = jax.vjp(lambda s, m: index_loss(s, jnp.asarray(mask), m), scores, mass)
        return out, *pull(jnp.ones_like(out))

    loss, to_scores, to_mass = both(*arguments)
    np.testing.assert_allclose(loss, want, rtol=1e-5, atol=1e-6)
    assert not to_mass.any() and np.isfinite(to_scores).all() and not np.asarray(to_scores)[~mask].any()
    assert np.abs(np.asarray(to_scores)[mask]).max() > 0.01


def _by_name(tree):
    return {jax.tree_util.keystr(path): np.asarray(g) for path, g in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.slow
def test_the_indexer_alone_learns_from_its_loss_and_from_nothing_else():
    model = weights.config(layer_types=("hca", "csa"))
    net = weights.build(model, weights.random_flat(model, 0))
    graphdef, params, fixed = nnx.split(net, nnx.Param, ...)
    ids = weights.tokens(model, (1, 24))

    @jax.jit
    def gradients(params):
        def losses(params):
            net = nnx.merge(graphdef, params, fixed)
            x, _, aux = net.forward_hidden(full_batch(ids), net.no_cache())
            return aux["indexer"].sum(), jnp.mean(jnp.square(net.logits(x)))

        return jax.jacrev(losses)(params)

    index, other = (_by_name(g) for g in gradients(params))
    for name in index:
        assert np.isfinite(index[name]).all() and np.isfinite(other[name]).all(), name
        assert index[name].any() == ("indexer" in name), name
        assert other[name].any() == ("indexer" not in name), name
