"""Penalties, biases, allowed ids and min_tokens: the sampler against vLLM's order in numpy, and in the engine.

A request with these options has neighbors without them, which must keep every bit.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from tests.serve.engine_harness import BLOCK, LIMITS, MODEL, Request, drive, reset_cache, tokens_of
from v4jax.core.errors import UserError
from v4jax.serve import model_steps
from v4jax.serve.engine import Engine
from v4jax.serve.sampler import make_sampling_tensors, sample, token_counts
from v4jax.serve.sampling_params import SamplingParams
from v4jax.serve.token_masks import BadWords

SAMPLE = functools.partial(jax.jit, static_argnums=3)(sample)
V = 50
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
PENALIZED = SamplingParams(
    max_tokens=24, seed=3, presence_penalty=0.7, frequency_penalty=0.4, repetition_penalty=1.3, logit_bias={7: 4.0}
)
RNG = np.random.default_rng(4)
PROMPTS = [RNG.integers(3, MODEL.vocab_size, n).tolist() for n in (15, 3, 300, 40)]


def reference(logits, params, prompt, generated, mask=None):
    """Logits of one row after the steps of vLLM's sampler that come before temperature and filters."""
    logits = logits.astype(np.float64).copy()
    if mask is not None:
        logits[~mask] = -np.inf
    if params.allowed_token_ids is not None:
        logits[[i for i in range(V) if i not in params.allowed_token_ids]] = -np.inf
    if len(generated) < params.min_tokens:
        logits[list(params.stop_token_ids)] = -np.inf
    for i, bias in params.logit_bias:
        logits[i] += bias
    for i in {*prompt, *generated}:
        factor = params.repetition_penalty
        logits[i] = logits[i] / factor if logits[i] > 0 else logits[i] * factor
    for i in set(generated):
        logits[i] -= params.frequency_penalty * generated.count(i) + params.presence_penalty
    return logits


def random_params(rng):
    """Options of one row; each is left out half of the time."""
    some = lambda value, default: value if rng.random() < 0.5 else default
    ids = lambda count: rng.choice(V, count, replace=False).tolist()
    return SamplingParams(
        temperature=0.0,
        max_tokens=16,
        presence_penalty=some(rng.uniform(-2, 2), 0.0),
        frequency_penalty=some(rng.uniform(-2, 2), 0.0),
        repetition_penalty=some(rng.uniform(0.5, 2), 1.0),
        logit_bias=some(dict(zip(ids(3), rng.uniform(-9, 9, 3).tolist(), strict=True)), None),
        min_tokens=some(int(rng.integers(0, 16)), 0),
        stop_token_ids=ids(int(rng.integers(0, 5))),
        allowed_token_ids=some(ids(int(rng.integers(6, 30))), None),
    )


@pytest.mark.parametrize("seed", range(8))
def test_logits_follow_vllms_order_in_random_batches_and_plain_rows_keep_their_bits(seed):
    rng = np.random.default_rng(seed)
    rows = [random_params(rng) for _ in range(12)]
    plain = [0, 5, 11]
    for i in plain:
        rows[i] = SamplingParams(seed=i, top_k=20, logprobs=4)
    prompts = [rng.integers(0, V, 9).tolist() for _ in rows]
    generated = [rng.integers(0, V, rng.integers(0, 12)).tolist() for _ in rows]
    logits = rng.normal(0, 3, (len(rows), V)).astype(np.float32)
    masks = rng.random((len(rows), V)) < 0.7
    masks[plain] = True
    bits = np.packbits(np.pad(masks, ((0, 0), (0, 64 - V))), axis=1, bitorder="little").view(np.int32)
    counts = np.stack([token_counts(p, g, V) for p, g in zip(prompts, generated, strict=True)])
    position = np.array([len(p) + len(g) for p, g in zip(prompts, generated, strict=True)], np.int32)
    options, plan = make_sampling_tensors(rows, list(map(len, prompts)))
    sampled = SAMPLE(logits, options, position, plan, counts, bits)
    for i, row in enumerate(rows):
        if i in plain:
            continue
        expected = reference(logits[i], row, prompts[i], generated[i], masks[i])
        if np.isfinite(expected).any():
            best = np.sort(expected)[-2:]
            assert best[1] - best[0] < 1e-4 or sampled.token_B[i] == np.argmax(expected)
    alone, plan = make_sampling_tensors([rows[i] for i in plain])
    bare = SAMPLE(logits[plain], alone, position[plain], plan)
    for field in ("token_B", "logprob_B", "rank_B", "top_BK", "top_ids_BK"):
        np.testing.assert_array_equal(np.asarray(getattr(sampled, field))[plain], getattr(bare, field))


def test_options_that_no_row_has_are_no_arrays():
    options, _ = make_sampling_tensors([SamplingParams(stop_token_ids=[4]), SamplingParams(top_k=3)])
    optional = ("penalty_B3", "bias_ids_BN", "bias_BN", "allowed_ids_BN", "stop_ids_BN", "min_position_B")
    assert all(getattr(options, name) is None for name in optional)


def test_a_row_of_which_nothing_is_left_ignores_the_last_restriction():
    row = SamplingParams(temperature=0.0, allowed_token_ids=[4, 5], stop_token_ids=[4, 5], min_tokens=3)
    options, plan = make_sampling_tensors([row], [0])
    logits = np.arange(V, dtype=np.float32)[None]
    assert SAMPLE(logits, options, np.zeros(1, np.int32), plan).token_B[0] == 5


# --- in the engine ---------------------------------------------------------------------------------------------------


@pytest.fixture
def engine(plain):
    reset_cache(plain)
    return plain


def expected_tokens(full_logits, prompt, params, count):
    """Greedy tokens by the reference and the forward without a cache."""
    tokens = []
    while len(tokens) < count:
        logits = full_logits([*prompt, *tokens])[-1]
        counts = token_counts(prompt, tokens, MODEL.vocab_size)
        options, plan = make_sampling_tensors([params], [len(prompt)])
        position = np.array([len(prompt) + len(tokens)], np.int32)
        tokens.append(int(SAMPLE(logits[None], options, position, plan, counts[None]).token_B[0]))
    return tokens


def test_penalties_count_prompt_and_generated_tokens(engine, full_logits):
    params = dataclasses.replace(PENALIZED, temperature=0.0, logit_bias=None, frequency_penalty=1.5)
    prompts = PROMPTS[:2]
    found = tokens_of(engine, [*prompts, PROMPTS[0]], [params, params, GREEDY])
    for prompt, tokens in zip(prompts, found, strict=False):
        assert tokens == expected_tokens(full_logits, prompt, params, 24)
    reset_cache(engine)
    assert found[2] == tokens_of(engine, [PROMPTS[0]], GREEDY)[0] != found[0]


@pytest.mark.slow
def test_penalized_requests_answer_as_alone_after_prefix_hits_and_preemption(engine):
    prompts, params = [PROMPTS[2], PROMPTS[3]], [PENALIZED, dataclasses.replace(PENALIZED, seed=9)]
    alone = []
    for prompt, own in zip(prompts, params, strict=True):
        reset_cache(engine)
        alone += tokens_of(engine, [prompt], own)
    reset_cache(engine)
    assert tokens_of(engine, prompts, params) == alone
    assert tokens_of(engine, prompts, params) == alone and engine.stats()["prefix_cache_hits"] == BLOCK
    reset_cache(engine, pages=2)
    long = [Request(PROMPTS[2][:250], PENALIZED), Request(PROMPTS[3][:10], PENALIZED)]
    crowded = drive(engine, long)
    assert engine.stats()["num_preemptions"] == 1
    for request, answer in zip(long, crowded, strict=True):
        reset_cache(engine)
        assert answer == drive(engine, [request])[0]


@pytest.mark.slow
def test_speculation_changes_no_penalized_token(model, engine):
    params = [PENALIZED, GREEDY, dataclasses.replace(PENALIZED, temperature=0.0, min_tokens=20, stop_token_ids=[9])]
    expected = tokens_of(engine, PROMPTS[:3], params)
    speculating = Engine(model, dataclasses.replace(LIMITS, num_speculative_tokens=2))
    assert tokens_of(speculating, PROMPTS[:3], params) == expected


def test_requests_without_options_run_todays_programs(engine):
    tokens_of(engine, PROMPTS[:2], GREEDY)
    programs = (model_steps.prefill, model_steps.decode, model_steps.sample_tokens)
    before = [program._cache_size() for program in programs]
    tokens_of(engine, PROMPTS[:2], [GREEDY, dataclasses.replace(PENALIZED, temperature=0.0)])
    after = [program._cache_size() for program in programs]
    assert after[:2] == before[:2] and after[2] > before[2]
    tokens_of(engine, PROMPTS[:2], GREEDY)
    assert [program._cache_size() for program in programs] == after


def test_min_tokens_holds_back_stop_ids_and_allowed_ids_are_kept(engine):
    [tokens] = tokens_of(engine, [PROMPTS[0]], GREEDY)
    held = dataclasses.replace(GREEDY, stop_token_ids=[tokens[1]], min_tokens=5)
    [found] = tokens_of(engine, [PROMPTS[0]], held)
    assert tokens[1] not in found[:5] and found[0] == tokens[0]
    allowed = dataclasses.replace(GREEDY, temperature=3.0, seed=1, allowed_token_ids=[5, 6, 1999])
    assert {*tokens_of(engine, [PROMPTS[0]], allowed)[0]} <= {5, 6, 1999}


def test_lower_priorities_run_first(engine):
    params = [dataclasses.replace(GREEDY, max_tokens=2, priority=priority) for priority in (2, 0, 1, 2)]
    for id, own in enumerate(params):
        engine.add_request(id, PROMPTS[id], own)
    order = []
    while engine.busy:
        order += [drawn.id for drawn in engine.step() if drawn.id not in order]
    assert order == [1, 2, 0, 3]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"allowed_token_ids": [1, 9999]}, "has 9999 in its allowed_token_ids; the model's ids are 0 to 2047"),
        ({"logit_bias": {2048: 1}}, "has 2048 in its logit_bias"),
    ],
)
def test_ids_beyond_the_vocabulary_are_refused(engine, options, words):
    with pytest.raises(UserError, match=words):
        engine.check([5], SamplingParams(**options), "prompt 0")


def test_bad_words_forbid_the_last_token_of_a_sequence(tokenizer):
    word = "zebra crossing"
    ids = tokenizer.encode(word)
    assert len(ids) > 2
    allowed = lambda generated: restricted(tokenizer, word, generated)[ids[-1]]
    assert allowed([]) and allowed(ids[1:-1]) and allowed([*ids[:-1], 5])
    assert not allowed(ids[:-1]) and not allowed([8, *ids[:-1]])
    [single] = [i for i in [tokenizer.encode("a")] if len(i) == 1]
    assert not restricted(tokenizer, "a", [])[single[0]]


def restricted(tokenizer, word, generated):
    mask_W = np.full(64, -1, np.int32)
    BadWords(tokenizer, [word]).restrict(generated, mask_W)
    return np.unpackbits(mask_W.view(np.uint8), bitorder="little").astype(bool)
