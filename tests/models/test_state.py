"""One forward with explicit state: however a row is cut into calls, it gives the logits of the whole row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.golden import weights
from v4jax.cache.allocate import contiguous_caches
from v4jax.cache.paged_cache import new_paged_layer_cache
from v4jax.config import Indexer, MoE, RoPE
from v4jax.models.transformer import continuation_batch

pytestmark = pytest.mark.slow

LENGTH, WIDTH = 45, 11  # of a row; of a call with several tokens (more than a window of SWA or CSA, less than of HCA)
CONFIGS = {
    "usual": weights.config(),
    "other": weights.config(
        layer_types=("hca", "csa"),
        o_groups=1,
        rope=RoPE(),
        sliding_window=5,
        compress_rate_csa=3,
        compress_rate_hca=12,
        indexer=Indexer(index_n_heads=20, index_head_dim=8, index_topk=2),
        moe=MoE(6, 3, 16, num_hash_layers=0, swiglu_limit=0.5),
    ),
    "long window": weights.config(
        layer_types=("csa", "hca", "swa"), sliding_window=24, compress_rate_csa=2, compress_rate_hca=6
    ),
}


@functools.cache
def case(name):
    """Network, tokens [3, LENGTH] and the logits of the full forward."""
    model = CONFIGS[name]
    net, ids = weights.build(model, weights.random_flat(model, 3)), weights.tokens(model, (3, LENGTH))
    return net, ids, np.asarray(weights.full(net, ids)[0])


def feed(net, ids, state, calls, width):
    """Run `calls` (tokens of each row in each call), padded to `width` with noise; logits of the real tokens."""
    rng, seen = np.random.RandomState(0), np.zeros(len(ids), np.int32)
    got = [[] for _ in ids]
    for counts in calls:
        call = rng.randint(0, 64, (len(ids), width)).astype(np.int32)
        for row, count in enumerate(counts):
            call[row, :count] = ids[row, seen[row] : seen[row] + count]
        logits, _, state = weights.step(net, call, seen, np.array(counts, np.int32), state)
        for row, count in enumerate(counts):
            got[row].extend(np.asarray(logits[row, :count]))
        seen += np.array(counts, np.int32)
    return got, state


def check(got, want):
    for row, logits in enumerate(got):
        np.testing.assert_allclose(
            np.array(logits).reshape(-1, want.shape[-1]), want[row, : len(logits)], rtol=0, atol=2e-5 * want.std()
        )


@pytest.mark.parametrize("name", CONFIGS)
def test_one_token_at_a_time(name):
    net, ids, want = case(name)
    check(feed(net, ids, contiguous_caches(net, 3, LENGTH), [[1] * 3] * LENGTH, 1)[0], want)


@st.composite
def ragged_calls(draw):
    """Calls in which every row takes 0 to WIDTH tokens, to a length of its own."""
    left = draw(st.lists(st.integers(0, LENGTH), min_size=3, max_size=3))
    calls = []
    while any(left):
        most = draw(st.sampled_from([1, 4, WIDTH]))
        calls.append([draw(st.integers(0, min(n, most))) for n in left])
        if not any(calls[-1]):
            calls[-1] = [min(n, most) for n in left]
        left = [n - taken for n, taken in zip(left, calls[-1], strict=True)]
    return calls


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(calls=ragged_calls())
def test_any_split_of_ragged_rows(name, calls):
    net, ids, want = case(name)
    check(feed(net, ids, contiguous_caches(net, 3, LENGTH), calls, WIDTH)[0], want)


@pytest.mark.parametrize("name", ["usual", "other"])
def test_decode_after_prefill_and_rows_that_wait(name):
    """Prefill of different lengths, then single tokens with one row left out now and then."""
    net, ids, want = case(name)
    first, state = feed(net, ids, contiguous_caches(net, 3, LENGTH), [[11, 3, 0], [11, 0, 7]], WIDTH)
    turns = [[1, 1, 1], [0, 1, 1], [1, 0, 1], [1, 1, 0]] * 5
    seen = np.array([len(row) for row in first], np.int32)
    for counts in turns:
        call = ids[np.arange(3), np.minimum(seen, LENGTH - 1)][:, None]
        logits, _, state = weights.step(net, call, seen, np.array(counts, np.int32), state)
        for row in np.flatnonzero(counts):
            first[row].append(np.asarray(logits[row, 0]))
        seen += np.array(counts, np.int32)
    check(first, want)


def test_calls_without_counts():
    """`count_B=None`: every token of the call is real; a call longer than the window, then the rest."""
    net, ids, want = case("usual")
    first, _, state = weights.step(net, ids[:, :26], np.zeros(3, np.int32), None, contiguous_caches(net, 3, LENGTH))
    rest, _, _ = weights.step(net, ids[:, 26:], np.full(3, 26, np.int32), None, state)
    check(np.concatenate([first, rest], 1), want)


def test_a_row_may_start_again():
    """A used state serves a new row from position 0: nothing of the old one shows."""
    net, ids, want = case("usual")
    _, state = feed(net, ids[::-1], contiguous_caches(net, 3, LENGTH), [[11, 11, 11], [11, 4, 11], [11, 11, 11]], WIDTH)
    check(feed(net, ids, state, [[11, 2, 11], [11, 11, 3]], WIDTH)[0], want)


def test_a_longer_state_changes_nothing():
    net, ids, want = case("usual")
    check(feed(net, ids, contiguous_caches(net, 3, 4 * LENGTH), [[11, 5, 9]] * 4, WIDTH)[0], want)


def test_mtp_keeps_its_own_past():
    model = weights.config(layer_types=("csa",), num_nextn_predict_layers=1)
    net, ids = weights.build(model, weights.random_flat(model, 4)), weights.tokens(model, (2, 34))

    @jax.jit
    def run(net, ids, start_B, state, past):
        chunk = continuation_batch(ids[:, :-1], start_B)
        x, state, _ = net.forward_hidden(chunk, state)
        logits, _, past, _ = net.mtp_forward(x, ids[:, 1:], chunk, past)
        return logits, state, past

    empty = lambda: (contiguous_caches(net, 2, 40), new_paged_layer_cache(model, "swa", 2, 40, jnp.float32))
    want = np.asarray(run(net, ids, np.zeros(2, np.int32), *empty())[0])
    got, carry = [], empty()
    for start in range(0, 33, 3):
        logits, *carry = run(net, ids[:, start : start + 4], np.full(2, start, np.int32), *carry)
        got.append(logits)
    np.testing.assert_allclose(np.concatenate(got, 1), want, rtol=0, atol=2e-5 * want.std())
