"""The sampler against plain numpy: what each filter leaves, how often each token comes, and what it depends on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.serve.sampler import SamplingFlags, make_sampling_tensors, sample
from v4jax.serve.sampling_params import SamplingParams

SAMPLE = functools.partial(jax.jit, static_argnums=3)(sample)
LOGITS = np.array([2.0, -1.0, 0.5, 3.0, 0.5, -4.0, 1.0, 2.5], np.float32)
DRAWS = 4096


def draws(logits, plan=None, **options):
    """DRAWS tokens of one row, at as many positions."""
    params = SamplingParams(seed=7, **options)
    arrays, needed = make_sampling_tensors([params] * DRAWS)
    return SAMPLE(jnp.tile(jnp.asarray(logits), (DRAWS, 1)), arrays, jnp.arange(DRAWS), plan or needed)


def reference(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Probabilities after temperature, min-p, top-k, top-p in this order; ties go to the lowest id."""
    p = np.exp((logits - logits.max()) / temperature, dtype=np.float64)
    p[p < min_p * p.max()] = 0
    order = np.argsort(-p, kind="stable")
    if top_k > 0:
        p[order[top_k:]] = 0
    p /= p.sum()
    before = 0.0
    for i in order:
        q, p[i] = p[i], p[i] if before < top_p else 0
        before += q
    return p / p.sum()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 3},
        {"top_k": 1},
        {"top_k": 100},
        {"top_k": -1},
        {"top_p": 0.6},
        {"top_p": 1e-6},
        {"top_p": 1e-38},
        {"top_p": 1e-300},
        {"top_k": 1, "top_p": 1e-38},
        {"top_k": 2, "top_p": 1e-38, "min_p": 1e-38},
        {"min_p": 1e-300},
        {"top_k": 3, "min_p": 1.0},
        {"temperature": 100.0},
        {"temperature": 1e-5},
        {"temperature": 2e-5, "top_p": 0.5},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"temperature": 1.5, "top_k": 5, "top_p": 0.8, "min_p": 0.1},
        {"top_k": 5},
        {"top_k": 2, "top_p": 0.99},
    ],
    ids=str,
)
def test_tokens_come_as_often_as_they_should(options):
    expected = reference(LOGITS, **options)
    counts = np.bincount(draws(LOGITS, **options).token_B, minlength=len(LOGITS))
    assert set(np.flatnonzero(counts)) <= set(np.flatnonzero(expected))
    # Five standard deviations of a count, and some for the expected counts below one.
    assert np.all(np.abs(counts - DRAWS * expected) <= 5 * np.sqrt(DRAWS * expected * (1 - expected)) + 2)


def test_a_filter_keeps_the_likeliest_beside_a_row_that_keeps_all():
    rows = [SamplingParams(seed=1, top_k=1, top_p=1e-38), SamplingParams(seed=1, temperature=100.0)] * 64
    arrays, plan = make_sampling_tensors(rows)
    tokens = np.asarray(SAMPLE(jnp.tile(jnp.asarray(LOGITS), (128, 1)), arrays, jnp.arange(128), plan).token_B)
    assert set(tokens[::2]) == {3} and len(set(tokens[1::2])) > 4


def test_ties_are_cut_at_the_lowest_id():
    assert set(np.asarray(draws(np.zeros(8, np.float32), top_k=3).token_B)) == {0, 1, 2}
    assert set(np.asarray(draws(np.zeros(8, np.float32), top_p=0.5).token_B)) == {0, 1, 2, 3}


def test_greedy_takes_the_likeliest_and_the_first_of_equals():
    for temperature in (0.0, 1e-30):
        arrays, plan = make_sampling_tensors([SamplingParams(temperature=temperature)] * 2)
        logits = np.stack([LOGITS, [0, 1, 1, 0, 0, 0, 0, 1], LOGITS, LOGITS]).astype(np.float32)
        assert not plan.needs_noise
        assert np.asarray(SAMPLE(logits, arrays, jnp.zeros(4, jnp.int32), plan).token_B)[:2].tolist() == [3, 1]


def test_a_rows_token_depends_on_its_seed_and_position_alone():
    given = [(1, 0, 1.0), (2**64 - 1, 3, 2.0), (1, 0, 0.0)]
    rows = [SamplingParams(seed=seed, top_k=k, temperature=t) for seed, k, t in given]
    logits = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32)
    together = SAMPLE(logits, *_at(rows, [5, 9, 5]))
    for i, row in enumerate(rows):
        alone = SAMPLE(logits[i : i + 1], *_at([row], [[5, 9, 5][i]]))
        assert alone.token_B[0] == together.token_B[i]
    # Needless work, asked for by another row, changes nothing.
    arrays, position, _ = _at(rows[:1], [5])
    assert SAMPLE(logits[:1], arrays, position, SamplingFlags(True, True, 4)).token_B[0] == together.token_B[0]
    # And the noise does differ by seed (both words of it) and by position.
    many = lambda seeds, positions: np.asarray(
        SAMPLE(np.zeros((8, 999), np.float32), *_at([SamplingParams(seed=seed) for seed in seeds], positions)).token_B
    )
    assert len(set(many([*range(4), *(i << 32 for i in range(1, 5))], [0] * 8))) > 5
    assert len(set(many([0] * 8, range(8)))) > 5
    assert len(set(many([3] * 8, [4] * 8))) == 1


def _at(rows, positions):
    """The last arguments of SAMPLE."""
    arrays, plan = make_sampling_tensors(rows)
    return arrays, jnp.asarray(positions, jnp.int32), plan


def test_no_seed_is_a_new_one_every_time():
    tokens = lambda: np.asarray(SAMPLE(np.zeros((4, 9999), np.float32), *_at([SamplingParams()] * 4, [0] * 4)).token_B)
    assert len({*tokens(), *tokens()}) > 4


def test_logprobs_are_the_models_own():
    sampled = draws(LOGITS, temperature=3.0, top_k=4, logprobs=3)
    expected = np.asarray(jax.nn.log_softmax(LOGITS))
    np.testing.assert_allclose(sampled.logprob_B, expected[sampled.token_B], rtol=1e-5)
    ranks = 1 + (expected[None] > expected[np.asarray(sampled.token_B)][:, None]).sum(-1)
    np.testing.assert_array_equal(sampled.rank_B, ranks)
    np.testing.assert_array_equal(np.asarray(sampled.top_ids_BK)[0], [3, 7, 0, 6])  # 3 asked for, 4 computed
    np.testing.assert_allclose(np.asarray(sampled.top_BK)[0], expected[[3, 7, 0, 6]], rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_say_so(bad):
    logits = np.stack([LOGITS, LOGITS])
    logits[0, 2] = bad
    sampled = SAMPLE(logits, *_at([SamplingParams(seed=0, top_p=0.9), SamplingParams(temperature=0)], [0, 0]))
    assert np.asarray(sampled.finite_B).tolist() == [False, True]
    assert 0 <= sampled.token_B[0] < 8 and sampled.token_B[1] == 3
