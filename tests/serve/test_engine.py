"""The engine against the forward without cache: shapes, chunks, batches, and what is compiled and moved."""

import dataclasses
import gc

import jax
import numpy as np
import pytest

from v4jax import config
from v4jax.core.check import UserError
from v4jax.serve import engine as engine_lib
from v4jax.serve.engine import Engine, Request
from v4jax.serve.sampling import SamplingParams

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(3, 2048, n).tolist() for n in (15, 1, 8, 12)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)


def run(engine, prompts, sampling=GREEDY):
    """Every row's tokens."""
    steps = list(engine.run([Request(prompt, sampling) for prompt in prompts]))
    return np.stack([step.token_B[: len(prompts)] for step in steps], 1).tolist()


@pytest.fixture(scope="module")
def engine(model):
    return Engine(model, config.Serve(max_batch=4, max_seq_len=64, prefill_chunk=64))


@pytest.fixture(scope="module")
def tokens(engine):
    return run(engine, PROMPTS)


def test_greedy_tokens_are_the_argmax_of_the_full_forward(tokens, full_logits):
    for prompt, new in zip(PROMPTS, tokens, strict=True):
        assert len(new) == 24
        logits = full_logits(prompt + new)
        assert np.argmax(logits[len(prompt) - 1 : -1], -1).tolist() == new


def test_rows_of_different_length_equal_each_alone(engine, tokens):
    assert [run(engine, [prompt])[0] for prompt in PROMPTS] == tokens


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_chunks_of_the_prompt_do_not_matter(model, tokens, chunk):
    assert run(Engine(model, config.Serve(4, 64, chunk)), PROMPTS) == tokens


def test_sampled_tokens_do_not_depend_on_the_batch_or_on_chunks(model, engine):
    sampling = SamplingParams(max_tokens=24, seed=11, top_p=0.9)
    together = run(engine, PROMPTS, sampling)
    assert run(engine, PROMPTS[::-1], sampling) == together[::-1]
    assert run(engine, PROMPTS[:1], sampling) == together[:1]
    assert run(Engine(model, config.Serve(4, 64, 7)), PROMPTS, sampling) == together
    assert run(engine, PROMPTS, dataclasses.replace(sampling, seed=12)) != together


def test_nothing_is_compiled_again_for_the_same_buckets(model, engine, tokens):
    programs = (engine_lib._empty, engine_lib._prefill, engine_lib._head, engine_lib._decode, engine_lib._sample)
    run(engine, PROMPTS)
    before = [program._cache_size() for program in programs]
    # Other prompts, lengths and values of the same options, in the same powers of two; and another engine.
    longer = SamplingParams(temperature=0.0, max_tokens=27, top_k=3)
    run(engine, [PROMPTS[1], [5] * 14, PROMPTS[0]], longer)
    run(Engine(model, engine.limits), PROMPTS)
    assert [program._cache_size() for program in programs] == before


def test_nothing_crosses_to_or_from_the_device_unasked(engine, tokens):
    with jax.transfer_guard("disallow"):
        assert run(engine, PROMPTS) == tokens


def test_the_device_is_one_step_ahead_and_no_more(engine, monkeypatch):
    dispatched, decode = [], engine_lib._decode
    monkeypatch.setattr(engine_lib, "_decode", lambda *args: dispatched.append(0) or decode(*args))
    counts = [len(dispatched) for _ in engine.run([Request([5], dataclasses.replace(GREEDY, max_tokens=4))])]
    assert counts == [1, 2, 3, 3]


def test_closing_early_frees_the_state(engine):
    gc.collect()
    before = len(jax.live_arrays())
    steps = engine.run([Request(PROMPTS[0], GREEDY)])
    first = next(steps)
    assert len(jax.live_arrays()) > before
    steps.close()
    assert len(jax.live_arrays()) == before and isinstance(first.token_B, np.ndarray)


def test_shapes_are_powers_of_two_or_the_limit(model, monkeypatch):
    class Stop(Exception):
        pass

    def head(*args):
        raise Stop

    rooms, chunks = [], []
    monkeypatch.setattr(engine_lib, "_empty", lambda *args: rooms.append(args[2:]) or (None, None))
    read = lambda *args: chunks.append([a.tolist() for a in args[4:]]) or (None, None)
    monkeypatch.setattr(engine_lib, "_prefill", read)
    monkeypatch.setattr(engine_lib, "_head", head)
    limited = Engine(model, config.Serve(max_batch=6, max_seq_len=100, prefill_chunk=64))
    for rows, prompt, most in [(1, 10, 24), (2, 41, 23), (3, 41, 24), (5, 1, 1), (1, 76, 24)]:
        with pytest.raises(Stop):
            next(limited.run([Request([5] * prompt, dataclasses.replace(GREEDY, max_tokens=most))] * rows))
    assert rooms == [(1, 64), (2, 64), (4, 100), (6, 64), (1, 100)]
    shapes = [(len(tokens), len(tokens[0])) for tokens, _, _ in chunks]
    assert shapes == [(1, 16), (2, 64), (4, 64), (6, 16), (1, 64), (1, 16)]
    assert chunks[3][2] == [1] * 5 + [0]  # the sixth row is padding
    assert chunks[4:] == [[[[5] * 64], [0], [64]], [[[5] * 12 + [0] * 4], [64], [12]]]


def test_rows_that_run_past_the_room_harm_nobody(engine, full_logits):
    """The first row ends at 20 tokens, but goes on as a dummy until the second is done: 15 + 63 tokens."""
    most = [5, 63, 20, 52]
    requests = [Request(p, dataclasses.replace(GREEDY, max_tokens=n)) for p, n in zip(PROMPTS, most, strict=True)]
    new = np.stack([step.token_B for step in engine.run(requests)], 1)
    assert new.shape == (4, 63)
    for prompt, count, row in zip(PROMPTS, most, new.tolist(), strict=True):
        logits = full_logits(prompt + row[:count])
        assert np.argmax(logits[len(prompt) - 1 : -1], -1).tolist() == row[:count]


@pytest.mark.parametrize("prompt, words", [
    ([], "at least one token"), ([5, 2048], "token id 2048; the model's ids are 0 to 2047"), ([-1], "token id -1"),
    ([5] * 41, "41 tokens, which with max_tokens 24 exceeds max_seq_len 64"),
], ids=["empty", "above", "below", "long"])  # fmt: skip
def test_requests_that_cannot_run_are_one_line(engine, prompt, words):
    with pytest.raises(UserError) as error:
        engine.check(Request(prompt, GREEDY), "prompt 3")
    assert str(error.value).startswith("prompt 3 ") and words in str(error.value) and "\n" not in str(error.value)
    engine.check(Request([5] * 40, GREEDY), "prompt 3")
