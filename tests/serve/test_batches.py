"""How the engine makes batches of requests: rows, chunks, shapes, what it compiles and moves, and how requests end.

The rest of the engine: test_engine.py; that answers do not depend on what else runs: test_equality.py.
"""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from tests.serve.engine_harness import LIMITS, MODEL, check_settled, draw_model, reset_cache, tokens_of
from v4jax import config
from v4jax.cache.paged_cache import PagedLayerCache
from v4jax.core.errors import UserError
from v4jax.models.transformer import Transformer
from v4jax.serve import model_steps
from v4jax.serve.engine import Engine
from v4jax.serve.model_runner import chunk_sizes
from v4jax.serve.sampler import SamplerOutput
from v4jax.serve.sampling_params import SamplingParams

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(3, MODEL.vocab_size, n).tolist() for n in (15, 1, 8, 12)]
LONG = RNG.integers(3, MODEL.vocab_size, 540).tolist()
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)


@pytest.fixture
def engine(plain):
    reset_cache(plain)
    return plain


@pytest.fixture(scope="module")
def together(plain):
    reset_cache(plain)
    return tokens_of(plain, PROMPTS, GREEDY)


# --- rows and chunks --------------------------------------------------------------------------------------------------


def test_rows_of_different_length_equal_each_alone(engine, together):
    assert [tokens_of(engine, [prompt], GREEDY)[0] for prompt in PROMPTS] == together


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_chunks_of_the_prompt_do_not_matter(engine, together, chunk):
    reset_cache(engine, chunk=chunk)
    assert tokens_of(engine, PROMPTS, GREEDY) == together


def test_sampled_tokens_do_not_depend_on_the_batch_or_on_chunks(engine):
    sampling = SamplingParams(max_tokens=24, seed=11, top_p=0.9)
    first = tokens_of(engine, PROMPTS, sampling)
    assert tokens_of(engine, PROMPTS[::-1], sampling) == first[::-1]
    assert tokens_of(engine, PROMPTS[:1], sampling) == first[:1]
    reset_cache(engine, chunk=7)
    assert tokens_of(engine, PROMPTS, sampling) == first
    assert tokens_of(engine, PROMPTS, dataclasses.replace(sampling, seed=12)) != first


def test_rows_that_end_early_make_room_and_harm_nobody(engine, full_logits):
    most, prompts = [5, 49, 20, 50, 1, 2, 40], [*PROMPTS, *PROMPTS[:3]]
    answers = tokens_of(engine, prompts, [dataclasses.replace(GREEDY, max_tokens=count) for count in most])
    for prompt, count, new in zip(prompts, most, answers, strict=True):
        assert len(new) == count
        assert np.argmax(full_logits(prompt + new)[len(prompt) - 1 : -1], -1).tolist() == new


def test_an_id_may_come_again_with_other_options(engine):
    """In the same row, so that nothing else tells one from the other."""
    sampled = SamplingParams(max_tokens=24, seed=3)
    first, second = tokens_of(engine, [PROMPTS[0]] * 2, [GREEDY, sampled])
    assert first != second
    for sampling, expected in [(GREEDY, first), (sampled, second), (GREEDY, first)]:
        assert tokens_of(engine, [PROMPTS[0]], sampling) == [expected]


def test_without_a_seed_every_answer_is_another(engine):
    first, second = tokens_of(engine, PROMPTS[:1] * 2, SamplingParams(max_tokens=8))
    assert first != second


# --- shapes, programs, transfers --------------------------------------------------------------------------------------


def test_nothing_is_compiled_again_for_the_same_buckets(model, engine):
    """Other prompts, lengths, values of the same options, prefix hits, preemption; and another engine."""
    compiled = {name: value for name, value in vars(model_steps).items() if hasattr(value, "_cache_size")}
    assert {"prefill", "decode", "sample_tokens", "logits", "copy_state", "propose_draft"} <= set(compiled)
    every_size = [
        RNG.integers(3, MODEL.vocab_size, size).tolist() for size in chunk_sizes(LIMITS.max_num_batched_tokens)
    ]
    for prompts in ([*PROMPTS, LONG[:300]], PROMPTS[:1], PROMPTS[:2], every_size):
        tokens_of(engine, prompts, GREEDY)
    before = {name: program._cache_size() for name, program in compiled.items()}
    longer = SamplingParams(temperature=0.0, max_tokens=30, top_k=3)
    reset_cache(engine, snapshot_interval_blocks=1)
    tokens_of(engine, [LONG, LONG[:530], [5] * 14, LONG[7:510]], longer)
    assert engine.stats()["prefix_cache_hits"]
    reset_cache(engine, pages=2)
    tokens_of(engine, [LONG[:250], PROMPTS[1]], longer)
    assert engine.stats()["num_preemptions"]
    tokens_of(Engine(model, LIMITS), PROMPTS, GREEDY)
    assert {name: program._cache_size() for name, program in compiled.items()} == before


def test_tables_and_options_cross_only_when_they_change(engine, monkeypatch):
    moved, put = [], jax.device_put
    engine.add_request("a", PROMPTS[0], GREEDY)
    for _ in range(4):
        engine.step()
    monkeypatch.setattr(jax, "device_put", lambda *args: moved.append(args) or put(*args))
    for _ in range(10):
        assert len(engine.step()) == 1
    assert not moved
    monkeypatch.undo()
    while engine.busy:
        engine.step()


def test_padding_rows_stay_at_the_beginning(engine):
    """Readers walk as far as the row furthest on, and three requests run as four rows."""
    tokens_of(engine, PROMPTS[:3], GREEDY)
    assert int(engine.model_runner.decode_state.position_Z[0]) == 0


def test_shapes_are_few(model, monkeypatch):
    chunks, batches = [], []

    def prefill(structure, weights, live, tokens_1T, start_1, count_1, state_slot_1, tables):
        chunks.append((tokens_1T.shape[1] - 1, int(start_1[0]), int(count_1[0])))
        return live, None, np.array([True])

    def decode(structure, weights, live, heads, rows, invariant):
        batches.append(rows[0].tolist())
        return live, None, np.zeros((len(rows[0]), 1, 1))

    def draw(structure, logits_BTV, heads, *args):
        B = len(logits_BTV)
        return heads, (SamplerOutput(np.full((B, 1), 7), np.full((B, 1), True)), np.full(B, 1))

    monkeypatch.setattr(model_steps, "logits", lambda *args: np.zeros((1, 1, 1)))
    monkeypatch.setattr(model_steps, "copy_state", lambda structure, live, *args: live)
    for name, fake in [("prefill", prefill), ("decode", decode), ("sample_tokens", draw)]:
        monkeypatch.setattr(model_steps, name, fake)
    limited = Engine(model, config.Serve(max_num_seqs=6, max_model_len=400, max_num_batched_tokens=100))
    tokens_of(limited, [[5] * n for n in (1, 16, 17, 65, 100, 230)], dataclasses.replace(GREEDY, max_tokens=20))
    assert chunks == [
        (16, 0, 1),
        (16, 0, 16),
        (25, 0, 17),
        (75, 0, 65),
        (100, 0, 100),
        (100, 0, 100),
        (100, 100, 100),
        (50, 200, 30),
    ]
    assert sorted({len(rows) for rows in batches}) == [1, 2, 4, 6]
    for rows in batches:  # padding comes last, and is record 0
        real = [row for row in rows if row]
        assert len(set(real)) == len(real) and rows == real + [0] * (len(rows) - len(real))


# --- ending -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 2, 6, 9])
@pytest.mark.parametrize("how", ["abort_request", "finish_request"])
def test_ending_early_frees_its_pages(engine, steps, how):
    engine.add_request("a", LONG[:300], GREEDY)
    for _ in range(steps):
        engine.step()
    assert (engine.stats()["num_blocks_in_use"] > 0) == (steps > 0)
    getattr(engine, how)("a")
    while engine.busy:
        engine.step()
    check_settled(engine)


def test_a_request_that_goes_wrong_while_it_decodes_leaves_nothing_behind(engine):
    """Its first token has a damaged embedding, so its second step is not finite; who gets its pages must not notice."""
    prompt, others = LONG[200:455], PROMPTS[:2]
    [[bad]] = tokens_of(engine, [prompt], dataclasses.replace(GREEDY, max_tokens=1))
    expected = tokens_of(engine, others, GREEDY)
    assert not any(bad in tokens for tokens in (prompt, *others, *expected))
    model = draw_model(0)
    model.embed.table = nnx.Param(model.embed.table[...].at[bad].set(np.nan))
    broken = Engine(model, LIMITS)
    for id, other in [("bad", prompt), *enumerate(others)]:
        broken.add_request(id, other, GREEDY)
    found, failed = {"bad": [], 0: [], 1: []}, []
    while broken.busy:
        for drawn in broken.step():
            if drawn.sampled.finite_B[drawn.row].all():
                found[drawn.id] += drawn.sampled.token_B[drawn.row, : drawn.count].tolist()
            else:
                failed.append((drawn.id, broken.stats()))
    assert found == {"bad": [bad], 0: expected[0], 1: expected[1]}
    assert [(id, stats["num_blocks_cached"]) for id, stats in failed] == [("bad", 0)]
    check_settled(broken)
    for kept in jax.tree.leaves(broken.model_runner.caches, is_leaf=lambda leaf: isinstance(leaf, PagedLayerCache)):
        # Records beyond the slots are copied to before they are read.
        slots = [array[: 1 + LIMITS.max_num_seqs] for array in (kept.window_ring_ZSH, *kept.compressor_state.values())]
        assert all(np.isfinite(a).all() for a in jax.tree.leaves((slots, kept.entries, kept.index_keys)))
    assert tokens_of(broken, others, GREEDY) == expected


def test_stacked_layers_are_refused():
    shape = dataclasses.replace(MODEL, layer_types=("csa", "csa", "csa"))
    with pytest.raises(UserError, match="load the model with scan=False"):
        Engine(nnx.eval_shape(lambda: Transformer(shape, nnx.Rngs(0), scan=True)), LIMITS)
