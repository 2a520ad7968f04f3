"""Many threads on one LLM: they share the batch, and each gets what it would get alone."""

import asyncio
import concurrent.futures
import dataclasses
import gc
import os
import queue
import threading
import time

import numpy as np
import pytest

from tests.serve import engine_harness
from v4jax.core.errors import UserError
from v4jax.data.tokenizer import Detokenizer
from v4jax.serve import LLM, SamplingParams
from v4jax.serve.engine import Engine
from v4jax.serve.model_runner import ModelRunner

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
    rows, decode, start = [], ModelRunner._decode, threading.Barrier(THREADS)
    count = lambda self, batch, *rest: rows.append(len(batch[0])) or decode(self, batch, *rest)
    monkeypatch.setattr(ModelRunner, "_decode", count)

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
            assert llm.stats()["num_requests_running"] <= engine_harness.LIMITS.max_num_seqs
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
    stats = llm.stats()
    assert stats["num_blocks_in_use"] == stats["num_requests_running"] == stats["num_requests_waiting"] == 0
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

    rows = llm.make_requests(PROMPTS[0], GREEDY)
    marked = rows[1].completions[0].detokenizer
    monkeypatch.setattr(Detokenizer, "push", broken)
    with pytest.raises(ZeroDivisionError, match="a bug of the tokenizer"):
        list(llm.engine_loop.run(rows))
    assert len([piece for piece in others]) > 0
    assert tokens(llm.generate(PROMPTS[1], GREEDY)) == want
    assert llm.stats()["num_requests_running"] == 0


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
    assert llm.stats()["num_requests_running"] == 0


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
    monkeypatch.setattr(llm.engine_loop, "_inline", True)
    monkeypatch.setattr(llm.engine_loop, "_drive", None)
    assert tokens(llm.generate(PROMPTS[0], GREEDY)) == want
    first, second = (llm.stream(PROMPTS[0], GREEDY) for _ in range(2))
    next(first), next(second)
    first.close()
    assert llm.stats()["num_requests_running"] > 0 and len(list(second)) > 0
    assert llm.stats()["num_blocks_in_use"] == 0
    with llm.engine_loop._driving, pytest.raises(UserError, match="serves one thread"):
        llm.generate(PROMPTS[0], GREEDY)


# --- what a server calls ----------------------------------------------------------------------------------------------


def joined(deltas):
    """(text, token ids, finish reason) of one request from the outputs of its stream, which has ended."""
    assert [delta.finished for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    text = "".join(delta.text for delta in deltas)
    return text, [token for delta in deltas for token in delta.token_ids], deltas[-1].finish_reason


def whole(llm, prompts, sampling):
    """The same of the outputs of `LLM.generate`."""
    return [(out.text, out.token_ids, out.finish_reason) for out in llm.generate(prompts, sampling)]


def submit(llm, prompt, sampling):
    """(request id, queue of its outputs)."""
    [request] = llm.make_requests([prompt], sampling)
    outputs = queue.SimpleQueue()
    return llm.engine_loop.submit(request, outputs.put), outputs


def drain(outputs):
    """All outputs of a request up to the last one."""
    deltas = [outputs.get(timeout=300)]
    while not deltas[-1].finished:
        deltas.append(outputs.get(timeout=300))
    assert outputs.empty()
    return deltas


def test_submit_from_many_threads_streams_the_answers_of_generate(llm):
    sampling = dataclasses.replace(GREEDY, logprobs=2)
    want = [whole(llm, prompts, sampling) for prompts in PROMPTS]
    logprobs = llm.generate(PROMPTS[1], sampling)[1].logprobs

    def ask(prompts):
        streams = [submit(llm, prompt, sampling)[1] for prompt in prompts]
        return [drain(stream) for stream in streams]

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(ask, PROMPTS))
    assert [[joined(deltas) for deltas in each] for each in found] == want
    assert all(len(deltas) == GREEDY.max_tokens for each in found for deltas in each)
    streamed = [one for delta in found[1][1] for one in delta.logprobs]
    assert [[(id, lp.rank) for id, lp in one.items()] for one in streamed] == [
        [(id, lp.rank) for id, lp in one.items()] for one in logprobs
    ]
    for one, expected in zip(streamed, logprobs, strict=True):  # last bits depend on the other rows of a batch
        np.testing.assert_allclose([lp.logprob for lp in one.values()], [lp.logprob for lp in expected.values()], 1e-5)
    assert llm.stats()["num_requests_running"] == 0
    assert not llm.engine_loop._submitted
    engine_harness.check_settled(llm.engine)


def test_abort_ends_the_request_of_an_id_alone(llm):
    [want] = whole(llm, [PROMPTS[0][1]], GREEDY)
    id, endless = submit(llm, PROMPTS[0][0], ENDLESS)
    first = endless.get(timeout=300)
    _, other = submit(llm, PROMPTS[0][1], GREEDY)
    llm.engine_loop.abort(id)
    text, token_ids, finish_reason = joined([first, *drain(endless)])
    assert finish_reason == "abort" and 0 < len(token_ids) < ENDLESS.max_tokens
    assert text == llm.tokenizer.decode(token_ids)
    assert joined(drain(other)) == want
    llm.engine_loop.abort(id)  # has ended
    assert llm.stats()["num_blocks_in_use"] == 0
    engine_harness.check_settled(llm.engine)


def test_abort_of_a_waiting_request_gives_one_empty_output(llm, monkeypatch):
    step, gate = Engine.step, threading.Event()
    monkeypatch.setattr(Engine, "step", lambda engine: gate.wait(60) and step(engine))
    streams = [submit(llm, [5], ENDLESS) for _ in range(engine_harness.LIMITS.max_num_seqs + 1)]
    llm.engine_loop.abort(streams[-1][0])
    gate.set()
    [last] = drain(streams[-1][1])
    assert (last.text, last.token_ids, last.finish_reason, last.num_cached_tokens) == ("", [], "abort", None)
    for id, outputs in streams[:-1]:
        llm.engine_loop.abort(id)
        drain(outputs)
    engine_harness.check_settled(llm.engine)


def test_generate_streams_in_an_event_loop_and_cancelling_aborts(llm):
    want = whole(llm, PROMPTS[2], GREEDY)

    async def read(request):
        return [delta async for delta in llm.engine_loop.generate(request)]

    async def serve():
        [endless] = llm.make_requests([PROMPTS[0][0]], ENDLESS)
        stream = llm.engine_loop.generate(endless)
        await anext(stream)
        waiting = asyncio.create_task(anext(stream))
        answers = await asyncio.gather(*map(read, llm.make_requests(PROMPTS[2], GREEDY)))
        waiting.cancel()
        await stream.aclose()
        return answers

    assert [joined(deltas) for deltas in asyncio.run(serve())] == want
    assert llm.stats()["num_requests_running"] == 0
    engine_harness.check_settled(llm.engine)


def test_a_callback_that_raises_aborts_its_request_alone(llm, caplog):
    [want] = whole(llm, [PROMPTS[0][1]], GREEDY)
    [request] = llm.make_requests([PROMPTS[0][0]], ENDLESS)
    called = []

    def broken(output):
        called.append(output)
        raise RuntimeError("Event loop is closed")

    llm.engine_loop.submit(request, broken)
    _, other = submit(llm, PROMPTS[0][1], GREEDY)
    assert joined(drain(other)) == want
    assert llm.stats()["num_requests_running"] == 0
    assert [type(output).__name__ for output in called] == ["RequestOutput", "RuntimeError"]
    assert "the callback of a request failed" in caplog.text
    engine_harness.check_settled(llm.engine)


def test_close_reaches_submitted_requests(model, tokenizer):
    llm = LLM(model, tokenizer=tokenizer, **OPTIONS)
    _, outputs = submit(llm, [5], ENDLESS)
    outputs.get(timeout=300)
    llm.close()
    while not isinstance(last := outputs.get(timeout=60), Exception):
        assert not last.finished
    assert isinstance(last, UserError) and "this LLM is closed" in str(last)
    with pytest.raises(UserError, match="this LLM is closed"):
        submit(llm, [5], ENDLESS)


def test_close_of_several_processes_keeps_its_time_limit(model, tokenizer, monkeypatch):
    """A step waits for ever for another process, which is gone."""
    llm = LLM(model, tokenizer=tokenizer, **OPTIONS)
    monkeypatch.setattr(llm.engine_loop, "_inline", True)
    with pytest.raises(UserError, match="several processes"):
        submit(llm, [5], GREEDY)
    stream = llm.stream([[5]], ENDLESS)
    next(stream)
    gate, step = threading.Event(), Engine.step
    monkeypatch.setattr(Engine, "step", lambda engine: gate.wait(60) and step(engine))
    start = time.monotonic()
    llm.close(0.2)
    assert time.monotonic() - start < 30
    assert not llm.engine_loop._tasks.empty() or llm.engine_loop._due
    gate.set()
    llm.close(60)  # after the step
    engine_harness.check_settled(llm.engine)
    with pytest.raises(UserError, match="this LLM is closed"):
        list(stream)
