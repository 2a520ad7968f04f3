"""The engine against the forward without cache; what is compiled, moved and kept."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.serve.engine_harness import BLOCK, LIMITS, MODEL, check_settled, draw_model, reset_cache, tokens_of
from v4jax import config
from v4jax.cache.paged_cache import PagedLayerCache
from v4jax.core.errors import UserError
from v4jax.serve import model_steps
from v4jax.serve.engine import Engine, validate_limits
from v4jax.serve.model_runner import chunk_sizes
from v4jax.serve.sampling_params import SamplingParams

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(3, 2048, n).tolist() for n in (15, 1, 8, 12)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)


@pytest.fixture
def engine(plain):
    reset_cache(plain)
    return plain


def test_greedy_tokens_are_the_argmax_of_the_full_forward(engine, full_logits):
    for prompt, new in zip(PROMPTS, tokens_of(engine, PROMPTS, GREEDY), strict=True):
        assert len(new) == 24
        logits = full_logits(prompt + new)
        assert np.argmax(logits[len(prompt) - 1 : -1], -1).tolist() == new


def test_nothing_is_compiled_again_whatever_the_context(engine):
    compiled = (
        model_steps.prefill,
        model_steps.decode,
        model_steps.logits,
        model_steps.sample_tokens,
        model_steps.copy_state,
    )
    for prompts in (PROMPTS, [PROMPTS[0]], PROMPTS[:2], [[5] * 300, [6] * 65, [7] * 15]):
        tokens_of(engine, prompts, GREEDY)
    before = [program._cache_size() for program in compiled]
    longer = SamplingParams(temperature=0.0, max_tokens=27, top_k=3)
    tokens_of(engine, [[9] * 520, PROMPTS[1], [5] * 290, PROMPTS[0]], longer)
    tokens_of(Engine(engine_model(engine), LIMITS), PROMPTS, GREEDY)
    assert [program._cache_size() for program in compiled] == before


def engine_model(engine):
    return engine.model_runner.model


def test_nothing_crosses_to_or_from_the_device_unasked(engine):
    with jax.transfer_guard("disallow"):
        tokens_of(engine, PROMPTS, GREEDY)


def test_the_device_is_one_step_ahead_and_no_more(engine, monkeypatch):
    sent, decode = [], model_steps.decode
    monkeypatch.setattr(model_steps, "decode", lambda *args: sent.append(0) or decode(*args))
    engine.add_request(0, [5], dataclasses.replace(GREEDY, max_tokens=4))
    counts = []
    while engine.busy:
        if engine.step():
            counts.append(len(sent))
    assert counts == [1, 2, 3, 3]  # decode steps sent when each token came; the first is the prompt's


def test_every_leaf_belongs_to_a_page_or_to_a_record(model):
    engine = Engine(model, dataclasses.replace(LIMITS, num_speculative_tokens=1))
    pages = 1 + engine.schedulers[0].block_pool.capacity
    records = 1 + LIMITS.max_num_seqs + 16
    assert pages != records
    by_axis = {"pages": 0, "records": 0}
    kept = jax.tree.leaves(engine.model_runner.caches, is_leaf=lambda leaf: isinstance(leaf, PagedLayerCache))
    for one in kept:
        for leaf in jax.tree.leaves((one.entries, one.index_keys)):
            assert leaf.shape[0] == pages
            by_axis["pages"] += leaf.nbytes
        for leaf in jax.tree.leaves((one.window_ring_ZSH, one.compressor_state)):
            assert leaf.shape[0] == records
            by_axis["records"] += leaf.nbytes
    assert all(isinstance(one, PagedLayerCache) for one in kept)
    assert sum(by_axis.values()) == engine.stats()["kv_device_used_bytes"]
    assert by_axis["pages"] == pages * engine.kv_cache_spec.block_bytes


def test_logits_that_are_not_finite_end_that_request_alone(engine):
    """The embedding of one token is damaged: in a prompt's first chunk, its last, and as what others avoid."""
    sound = tokens_of(engine, PROMPTS, GREEDY)
    damaged = next(token for token in (1, 2) if not any(token in tokens for tokens in sound))  # not in prompts
    model = draw_model(0)
    model.embed.table = nnx.Param(model.embed.table[...].at[damaged].set(jnp.nan))
    bad = Engine(model, LIMITS)
    long = RNG.integers(3, 2048, 300).tolist()
    for at in (5, 299):
        ids = [*range(4), "bad"]
        for id, prompt in zip(ids, [*PROMPTS, [*long[:at], damaged, *long[at + 1 :]]], strict=True):
            bad.add_request(id, prompt, GREEDY)
        got = {id: [] for id in ids}
        while bad.busy:
            for drawn in bad.step():
                finite = drawn.sampled.finite_B[drawn.row, 0]
                assert finite == (drawn.id != "bad")
                got[drawn.id].append(int(drawn.sampled.token_B[drawn.row, 0]))
        assert [got[i] for i in range(4)] == sound and len(got["bad"]) == 1
        check_settled(bad)
        assert bad.stats()["num_blocks_cached"] == bad.stats()["num_snapshots_cached"] == 0  # nothing of it is kept
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(bad.model_runner.caches))


@pytest.mark.parametrize(
    "prompt, words",
    [
        ([], "at least one token"),
        ([5, 2048], "token id 2048; the model's ids are 0 to 2047"),
        ([-1], "token id -1"),
        ([5] * 553, "553 tokens, which with max_tokens 24 exceeds max_model_len 576"),
    ],
    ids=["empty", "above", "below", "long"],
)
def test_requests_that_cannot_run_are_one_line(engine, prompt, words):
    with pytest.raises(UserError) as error:
        engine.check(prompt, GREEDY, "prompt 3")
    assert str(error.value).startswith("prompt 3 ") and words in str(error.value) and "\n" not in str(error.value)
    engine.check([5] * 552, GREEDY, "prompt 3")


def test_what_the_pool_cannot_hold_is_one_line(model):
    small = Engine(model, LIMITS, config.Cache(kv_cache_tokens=BLOCK))
    with pytest.raises(UserError, match="needs 2 pages of 256 tokens, but the cache has 1"):
        small.check([5] * 250, GREEDY, "prompt 0")


@pytest.mark.parametrize(
    "limits, cache, words",
    [
        ({"num_speculative_tokens": 1, "batch_invariant": True}, {}, "exclude each other"),
        ({"max_model_len": 5000}, {}, "exceeds model.max_position_embeddings"),
        ({"max_num_seqs": 0}, {}, "max_num_seqs must be at least 1"),
        ({}, {"kv_cache_dtype": "fp7"}, "cache.kv_cache_dtype is 'fp7'"),
        ({}, {"block_size": 30}, "not a multiple of model.compress_rate_csa 4"),
        ({}, {"num_state_snapshots": -1}, "cache.num_state_snapshots must be at least 0, got -1"),
    ],
)
def test_limits_that_cannot_be_kept_are_one_line(model, limits, cache, words):
    with pytest.raises(UserError, match=words):
        Engine(model, dataclasses.replace(LIMITS, **limits), config.Cache(**cache))


def test_a_model_without_the_layer_cannot_speculate(model):
    plain = dataclasses.replace(MODEL, num_nextn_predict_layers=0)
    with pytest.raises(UserError, match="needs a model with an MTP layer"):
        validate_limits(plain, dataclasses.replace(LIMITS, num_speculative_tokens=1), config.Cache())


def test_prompt_chunks_come_in_few_sizes():
    assert chunk_sizes(1024) == [16, 64, 256, 512, 768, 1024]
    assert chunk_sizes(4096) == [16, 64, 256, 1024, 2048, 3072, 4096]
    for longest in range(1, 200):
        sizes = chunk_sizes(longest)
        assert sizes[-1] >= longest and sizes == sorted(set(sizes)) and len(sizes) <= 6
