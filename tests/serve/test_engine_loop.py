"""Many threads on one LLM: they share the batch, and each gets what it would get alone."""

import concurrent.futures
import dataclasses
import gc
import os
import threading

import numpy as np
import pytest

from tests.serve import engine_harness
from v4jax.core.errors import UserError
from v4jax.data.tokenizer import Detokenizer
from v4jax.serve import LLM, SamplingParams
from v4jax.serve.engine import Engine

OPTIONS = {
    name: getattr(engine_harness.LIMITS, name) for name in ("max_num_seqs", "max_model_len", "max_num_batched_tokens")
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
ENDLESS = dataclasses.replace(GREEDY, max_tokens=500)
THREADS = 20
RNG = np.random.default_rng(2)
PROMPTS = [[RNG.integers(3, 2048, n).tolist() for n in (1 + thread, 30, 3)] for thread in range(THREADS)]


@pytest.fixture
def llm(model, tokenizer):
    with LLM(model, tokenizer=tokenizer, **OPTIONS) as llm:
        yield llm


def tokens(outputs):
    return [out.token_ids for out in outputs]


def test_generate_from_many_threads_gives_the_answers_of_one(llm, monkeypatch):
    alone = [[tokens(llm.generate([prompt], GREEDY))[0] for prompt in prompts] for prompts in PROMPTS]
    rows, decode, start = [], Engine._decode, threading.Barrier(THREADS)
    count = lambda self, batch, size: rows.append(len(batch[0])) or decode(self, batch, size)
    monkeypatch.setattr(Engine, "_decode", count)

    def ask(prompts):
        start.wait(60)
        return [tokens(llm.generate(prompts, GREEDY)) for _ in range(2)]

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for answers, want in zip(pool.map(ask, PROMPTS), alone, strict=True):
            assert answers == [want, want]
    assert max(rows) == engine_harness.LIMITS.max_num_seqs and sum(rows) > 2 * len(rows)
    engine_harness.check_settled(llm.engine)


def test_stream_and_stats_from_many_threads(llm):
    want = [[out.text for out in llm.generate(prompts, GREEDY)] for prompts in PROMPTS]

    def read(prompts):
        texts = [""] * len(prompts)
        for index, piece in llm.stream(prompts, GREEDY):
            texts[index] += piece
            assert llm.stats()["running"] <= engine_harness.LIMITS.max_num_seqs
        return texts

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(read, PROMPTS)) == want
    engine_harness.check_settled(llm.engine)


def test_streams_left_in_every_way_free_what_they_held(llm):
    want = tokens(llm.generate(PROMPTS[0], GREEDY))
    streams = [llm.stream(prompts, ENDLESS) for prompts in PROMPTS[:3]]
    for stream in streams:
        next(stream)
    closed, collected, in_thread = streams
    del streams, stream
    closed.close()
    del collected
    gc.collect()
    other = threading.Thread(target=in_thread.close)
    other.start()
    other.join()
    assert llm.stats()["pages_in_use"] == llm.stats()["running"] == llm.stats()["waiting"] == 0
    assert tokens(llm.generate(PROMPTS[0], GREEDY)) == want
    engine_harness.check_settled(llm.engine)


def test_an_error_of_one_caller_is_no_others(llm, monkeypatch):
    want = tokens(llm.generate(PROMPTS[1], GREEDY))
    push = Detokenizer.push
    others = llm.stream(PROMPTS[1], GREEDY)
    next(others)

    def broken(self, token):
        if self is marked:
            raise ZeroDivisionError("a bug of the tokenizer")
        return push(self, token)

    rows = llm._rows(PROMPTS[0], GREEDY)
    marked = rows[1].detokenizer
    monkeypatch.setattr(Detokenizer, "push", broken)
    with pytest.raises(ZeroDivisionError, match="a bug of the tokenizer"):
        list(llm._loop.run(rows))
    assert len([piece for piece in others]) > 0
    assert tokens(llm.generate(PROMPTS[1], GREEDY)) == want
    assert llm.stats()["running"] == 0


def test_close_while_others_generate_ends_them_with_one_line(model, tokenizer):
    llm = LLM(model, tokenizer=tokenizer, **OPTIONS)
    begun, errors = threading.Semaphore(0), []

    def ask(prompts):
        try:
            for _ in llm.stream(prompts, ENDLESS):
                begun.release()
        except UserError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=ask, args=(prompts,)) for prompts in PROMPTS[:5]]
    for thread in threads:
        thread.start()
    assert begun.acquire(timeout=300)
    llm.close()
    for thread in threads:
        thread.join(60)
    assert errors == ["this LLM is closed; make a new one to generate"] * 5
    engine_harness.check_settled(llm.engine)
    for call in (lambda: llm.generate([[5]], GREEDY), lambda: next(llm.stream([[5]], GREEDY))):
        with pytest.raises(UserError, match="this LLM is closed; make a new one to generate"):
            call()
    llm.close()  # again does nothing
    assert llm.stats()["running"] == 0


def test_a_forked_process_is_told_at_once(llm, monkeypatch):
    llm.generate([[5]], GREEDY)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    for call in (lambda: llm.generate([[5]], GREEDY), llm.stats, llm.close):
        with pytest.raises(UserError, match="made in another process, and JAX does not work after a fork"):
            call()
    monkeypatch.undo()


def test_the_engine_of_several_processes_serves_one_thread(llm, monkeypatch):
    """The caller's thread makes the steps, in the order in which it asks."""
    want = tokens(llm.generate(PROMPTS[0], GREEDY))
    monkeypatch.setattr(llm._loop, "_inline", True)
    monkeypatch.setattr(llm._loop, "_drive", None)
    assert tokens(llm.generate(PROMPTS[0], GREEDY)) == want
    first, second = (llm.stream(PROMPTS[0], GREEDY) for _ in range(2))
    next(first), next(second)
    first.close()
    assert llm.stats()["running"] > 0 and len(list(second)) > 0
    assert llm.stats()["pages_in_use"] == 0
    with llm._loop._driving, pytest.raises(UserError, match="serves one thread"):
        llm.generate(PROMPTS[0], GREEDY)
