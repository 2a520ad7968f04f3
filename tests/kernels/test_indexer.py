"""Indexer scores and top-k search against the reference, for every size of a pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from v4jax.core.errors import UserError
from v4jax.core.qtensor import QTensor, quantize
from v4jax.kernels.indexer import ref, score, score_picked, topk_mask, topk_search, xla, xla_cpu
from v4jax.kernels.tuning import tuned

B, J, L, C = 2, 4, 8, 21


def _inputs(queries: int, entries: int = C):
    rng = np.random.default_rng(queries)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    return draw(B, queries, J, L), draw(B, queries, J), draw(B, entries, L)


def _search(operands, k: int, **options) -> jax.Array:
    """Search where query t sees 4 + t entries; keys beyond the last entry are large."""
    q_BTJL, w_BTJ, keys_BCL = operands
    T = q_BTJL.shape[1]
    padded = jnp.pad(keys_BCL, ((0, 0), (0, 256), (0, 0)), constant_values=9.0)
    read = lambda first, count, raw_fp8: jax.lax.dynamic_slice_in_dim(padded, first, count, axis=1)
    mask = lambda first, count: jnp.broadcast_to(first + jnp.arange(count) < 4 + jnp.arange(T)[:, None], (B, T, count))
    sizes = {"num_entries": keys_BCL.shape[1], "num_visible": jnp.int32(3 + T), "k": k}
    return topk_search(q_BTJL, w_BTJ, read, mask, **sizes, **options)


@pytest.mark.parametrize("impl", ["ref", "xla"])
def test_score_is_the_formula(impl):
    """relu before the weight, the weight may be negative; an entry no head likes scores exactly zero."""
    rng = np.random.RandomState(0)
    q, w, keys = rng.standard_normal((2, 3, 4, 5)), rng.standard_normal((2, 3, 4)), rng.standard_normal((2, 6, 5))
    q[..., 0], keys[:, 5] = -np.abs(q[..., 0]), [1, 0, 0, 0, 0]
    got = np.asarray(score(*(jnp.asarray(a, jnp.float32) for a in (q, w, keys)), impl=impl))
    want = np.zeros((2, 3, 6))
    for b, t, c, j in np.ndindex(2, 3, 6, 4):
        want[b, t, c] += w[b, t, j] * max(q[b, t, j] @ keys[b, c], 0)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert (got < 0).any() and not got[..., 5].any()


@pytest.mark.parametrize("queries", [1, 5])
def test_score_equals_the_reference(queries):
    q_BTJL, w_BTJ, keys_BCL = operands = _inputs(queries)
    want_BTC = score(*operands, impl="ref")
    np.testing.assert_allclose(score(*operands), want_BTC, atol=1e-5)
    np.testing.assert_allclose(xla_cpu.score_decode(*operands), want_BTC, atol=1e-5)
    keys_BTKL = jnp.broadcast_to(keys_BCL[:, None], (B, queries, C, L))
    np.testing.assert_allclose(score_picked(q_BTJL, w_BTJ, keys_BTKL), want_BTC, atol=1e-5)


@pytest.mark.parametrize("query_tile", [4, 5, 64])
def test_score_in_tiles_equals_the_reference(query_tile):
    operands = _inputs(12)
    np.testing.assert_allclose(xla_cpu.score_tiled(*operands, query_tile), ref.score(*operands), atol=1e-5)


@pytest.mark.parametrize("impl", ["xla", "xla_cpu", "xla_scaled_dot", None])
@pytest.mark.parametrize("per_pass", [1, 3, 4, 64])
@pytest.mark.parametrize("queries", [1, 12])
def test_topk_search_equals_the_reference(monkeypatch, queries, per_pass, impl):
    numbers = dict.fromkeys(("entries_per_prefill_pass", "min_entries_per_decode_pass"), per_pass)
    numbers = tuned("indexer") | numbers | {"key_elements_per_decode_pass": 0}
    monkeypatch.setattr(xla, "tuned", lambda name, *_: numbers if name == "indexer" else tuned(name))
    q_BTJL, w_BTJ, keys_BCL = _inputs(queries)
    keys_BCL = keys_BCL.at[:, 3:9].set(keys_BCL[:, 2:3]).at[:, 10:14].set(0.0)  # equal scores, and zeros
    operands = (q_BTJL, w_BTJ, keys_BCL)
    np.testing.assert_array_equal(_search(operands, 6, impl=impl), _search(operands, 6, impl="ref"))


def test_topk_search_gives_minus_one_beyond_the_visible_entries():
    picks_BTK = np.asarray(_search(_inputs(2), 7))
    assert (np.sort(picks_BTK[0, 0]) == [-1, -1, -1, 0, 1, 2, 3]).all()
    assert (picks_BTK[0, 0, 4:] == -1).all()
    assert (np.sort(picks_BTK[1, 1]) == [-1, -1, 0, 1, 2, 3, 4]).all()


def test_topk_search_passes_through_a_gradient():
    """Reverse mode cannot differentiate a loop of unknown length, so the search takes no part in it."""
    q_BTJL, w_BTJ, keys_BCL = _inputs(3)
    loss = lambda w_BTJ: jnp.sum(w_BTJ) + jnp.sum(_search((q_BTJL, w_BTJ, keys_BCL), 3))
    np.testing.assert_array_equal(jax.grad(loss)(w_BTJ), 1)


def test_topk_search_in_e4m3_equals_that_of_dequantized_keys():
    """Queries that e4m3 holds exactly, so the product of codes loses nothing."""
    q_BTJL, w_BTJ, keys_BCL = _inputs(3)
    q_BTJL = QTensor(*quantize(q_BTJL, "fp8", L)).astype(jnp.float32)
    keys = QTensor(*quantize(keys_BCL, "fp8", L))
    seen = []

    def read(first, count, raw_fp8):
        seen.append(raw_fp8)
        return keys if raw_fp8 else keys.astype(jnp.float32)

    mask = lambda first, count: jnp.ones((B, 3, count), bool)
    sizes = {"num_entries": C, "num_visible": jnp.int32(C), "k": 5}
    searches = [topk_search(q_BTJL, w_BTJ, read, mask, **sizes, impl=impl) for impl in ("xla_scaled_dot", "xla")]
    np.testing.assert_array_equal(*searches)
    assert set(seen) == {True, False}


def test_topk_search_refuses_an_unknown_implementation():
    with pytest.raises(UserError, match="unknown implementation 'fast'; one of ref, xla, xla_cpu, xla_scaled_dot"):
        _search(_inputs(1), 2, impl="fast")


# Few values, so that most are tied; minus zero is what negative weights make of inactive heads.
TIED = st.lists(st.sampled_from([-np.inf, -1.0, -0.0, 0.0, 0.0, 0.5, 2.0]), min_size=9, max_size=9)

MASK = jax.jit(topk_mask, static_argnums=1)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _search_tied(scores_C, k, per_pass):
    """`topk_search` over entries whose keys give these scores: positive ones by one head, negative ones by another."""
    finite = jnp.where(scores_C > -jnp.inf, scores_C, 0.0)
    keys_CL = jnp.stack([jnp.maximum(finite, 0), jnp.maximum(-finite, 0)], -1)
    index = lambda first, count: jnp.minimum(first + jnp.arange(count), 8)
    read = lambda first, count, raw_fp8: keys_CL[None, index(first, count)]
    seen = lambda first, count: (first + jnp.arange(count) < 9) & (scores_C > -jnp.inf)[index(first, count)]
    numbers = tuned("indexer") | {"min_entries_per_decode_pass": per_pass, "key_elements_per_decode_pass": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "tuned", lambda name, *_: numbers if name == "indexer" else tuned(name))
        operands = (jnp.eye(2)[None, None], jnp.array([[[1.0, -1.0]]]), read, lambda *run: seen(*run)[None, None])
        return topk_search(*operands, num_entries=9, num_visible=jnp.int32(9), k=k)[0, 0]


def _picks_by_rule(scores, k):
    """The rule in plain Python: higher score first, of equals the lower index, invisible ones never."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return [i if scores[i] > -np.inf else -1 for i in order[:k]]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(scores=TIED, k=st.integers(1, 9), per_pass=st.sampled_from([4, 1024]))
def test_topk_search_gives_ties_to_the_lowest_index_and_topk_mask_is_that_set(scores, k, per_pass):
    array = jnp.asarray(scores, jnp.float32)[None, None]
    picks = _search_tied(array[0, 0], k, per_pass).tolist()
    assert picks == _picks_by_rule(scores, k)
    chosen = np.flatnonzero(np.asarray(MASK(array, k))[0, 0] & (np.asarray(scores) > -np.inf)).tolist()
    assert chosen == sorted(i for i in picks if i >= 0)
