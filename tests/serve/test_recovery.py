"""Exceptions inside a step: callers see them as they are, and the engine goes on, empty but right."""

import contextlib
import dataclasses
import gc
import os
import queue
import signal
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.serve import engine_harness, interrupts
from tests.serve.engine_harness import LIMITS, Request, check_settled, draw_model, drive
from tests.serve.offload_harness import LONG, tiered
from v4jax import config
from v4jax.serve import LLM, SamplingParams, data_parallel, device_connector, model_steps
from v4jax.serve.engine import Engine
from v4jax.serve.model_runner import ModelRunner

OPTIONS = {name: getattr(LIMITS, name) for name in ("max_num_seqs", "max_model_len", "max_num_batched_tokens")}
LONG_PROMPT = np.random.default_rng(1).integers(3, 2048, 300).tolist()  # a block of it is kept, with a record
PROMPTS = [[5, 6, 7], LONG_PROMPT, [9] * 20]
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


class Injected(jax.errors.JaxRuntimeError):
    """An error as XLA raises it."""


def failing(function, *, after=False, times=1, skip=0):
    """`function`, which raises at some calls: before it does anything, or after, its donated arguments being gone."""
    calls = iter(range(10**9))

    def run(*args, **kwargs):
        fails = skip <= next(calls) < skip + times
        if fails and not after:
            raise Injected("RESOURCE_EXHAUSTED: out of memory")
        result = function(*args, **kwargs)
        if fails:
            raise Injected("RESOURCE_EXHAUSTED: out of memory")
        return result

    return run


@pytest.fixture(scope="module")
def llm(model, tokenizer):
    llm = LLM(model, tokenizer=tokenizer, **OPTIONS)
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def speculating(model, tokenizer):
    """An LLM whose MTP layer drafts 2 tokens in each step."""
    with LLM(model, tokenizer=tokenizer, num_speculative_tokens=2, **OPTIONS) as llm:
        yield llm


@pytest.fixture(scope="module")
def answers(llm):
    return [out.token_ids for out in llm.generate(PROMPTS, GREEDY)]


def works(llm, answers):
    """The LLM answers as ever and holds nothing after."""
    assert [out.token_ids for out in llm.generate(PROMPTS, GREEDY)] == answers
    check_settled(llm.engine)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("where", ["prefill", "logits", "sample_tokens", "decode", "copy_state"])
def test_engine_an_error_of_a_program_reaches_the_caller_and_the_next_call_works(
    llm, answers, monkeypatch, where, after
):
    with monkeypatch.context() as patch:
        patch.setattr(model_steps, where, failing(getattr(model_steps, where), after=after))
        with pytest.raises(Injected, match="RESOURCE_EXHAUSTED") as error:
            llm.generate([*PROMPTS, LONG_PROMPT], GREEDY)
        assert error.value.__cause__ is error.value.__context__ is None  # nothing masks it
    works(llm, answers)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_engine_an_error_of_the_draft_program_reaches_the_caller_and_the_next_call_works(
    speculating, answers, monkeypatch, after
):
    works(speculating, answers)
    with monkeypatch.context() as patch:
        patch.setattr(model_steps, "propose_draft", failing(model_steps.propose_draft, after=after, skip=2))
        with pytest.raises(Injected, match="RESOURCE_EXHAUSTED") as error:
            speculating.generate([*PROMPTS, LONG_PROMPT], GREEDY)
        assert error.value.__cause__ is error.value.__context__ is None
    works(speculating, answers)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
def test_engine_any_exception_on_the_way_back_reaches_the_caller(llm, answers, monkeypatch, error):
    with monkeypatch.context() as patch:
        patch.setattr(
            data_parallel.DataParallelGroup, "get", lambda *_: (_ for _ in ()).throw(error("while results are fetched"))
        )
        with pytest.raises(error, match="while results are fetched"):
            llm.generate(PROMPTS, GREEDY)
    works(llm, answers)


def test_engine_two_callers_of_a_failed_step_both_raise(llm, answers, monkeypatch):
    endless = dataclasses.replace(GREEDY, max_tokens=200)
    streams = [llm.stream([prompt], endless) for prompt in PROMPTS[:2]]
    for stream in streams:
        next(stream)
    with monkeypatch.context() as patch:
        patch.setattr(model_steps, "decode", failing(model_steps.decode, times=10**9))
        for stream in streams:
            with pytest.raises(Injected):
                for _ in stream:
                    pass
    works(llm, answers)


def test_engine_a_failed_step_reaches_submitted_requests(llm, answers, monkeypatch):
    outputs = queue.SimpleQueue()
    endless = dataclasses.replace(GREEDY, max_tokens=200)
    with monkeypatch.context() as patch:
        patch.setattr(model_steps, "decode", failing(model_steps.decode, times=10**9, skip=3))
        for request in llm.make_requests(PROMPTS[:2], endless):
            llm.engine_loop.submit(request, outputs.put)
        errors = 0
        while errors < 2:
            errors += isinstance(outputs.get(timeout=300), Injected)
    works(llm, answers)
    assert not llm.engine_loop._submitted


def test_engine_a_failing_wipe_ends_in_a_sound_engine(monkeypatch, answers):
    """Damaged logits of one request, and then the program that wipes its pages fails too."""
    damaged = next(i for i in range(300, 2048) if not any(i in ids for ids in [*answers, *PROMPTS]))
    model = draw_model(0)
    model.embed.table = nnx.Param(model.embed.table[...].at[damaged].set(jnp.nan))
    with LLM(model, **OPTIONS) as llm:
        with monkeypatch.context() as patch:
            patch.setattr(model_steps, "zero_state", failing(model_steps.zero_state))
            with pytest.raises(Injected):
                llm.generate([*PROMPTS, [damaged]], GREEDY)
        works(llm, answers)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(llm.engine.model_runner.caches))


def test_engine_a_reset_that_fails_is_tried_again(llm, answers, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(model_steps, "decode", failing(model_steps.decode))
        patch.setattr(ModelRunner, "reset", failing(ModelRunner.reset, times=2))
        for _ in range(2):  # the second call meets the second reset
            with pytest.raises(Injected):
                llm.generate(PROMPTS, GREEDY)
    works(llm, answers)


def test_engine_drops_what_the_device_cached_and_counts_on(llm, answers, monkeypatch):
    works(llm, answers)
    before = llm.stats()
    assert before["num_blocks_cached"] > 0
    with monkeypatch.context() as patch:
        patch.setattr(model_steps, "decode", failing(model_steps.decode))
        with pytest.raises(Injected):
            llm.generate([[5]], GREEDY)
    after = llm.stats()
    assert after["num_blocks_cached"] == after["num_snapshots_cached"] == after["num_blocks_in_use"] == 0
    assert after["prefix_cache_queries"] >= before["prefix_cache_queries"]
    assert after["prefix_cache_hits"] >= before["prefix_cache_hits"] > 0


@pytest.mark.parametrize("where", ["pack_blocks", "unpack_blocks"])
def test_engine_tiers_survive_an_error_between_them_and_the_device(model, plain, monkeypatch, where):
    """A copy down that has no memory is left out; one up is an error like any other."""
    asked = [Request(prompt, GREEDY) for prompt in (LONG_PROMPT, LONG_PROMPT[::-1], LONG_PROMPT)]
    engine_harness.reset_cache(plain, pages=11)
    want = [answer.tokens for one in asked for answer in drive(plain, [one])]
    with tiered(model, host=1 << 24) as engine:
        engine_harness.reset_cache(engine, pages=2)
        tokens = lambda one: drive(engine, [one])[0].tokens
        assert [tokens(one) for one in asked[:2]] == want[:2]
        assert engine.kv_connector.flush(engine.model_runner.caches, LONG)
        held = engine.stats()["host_blocks"]
        assert held == 2
        with monkeypatch.context() as patch:
            patch.setattr(device_connector, where, failing(getattr(device_connector, where), times=10**9))
            with pytest.raises(Injected) if where == "unpack_blocks" else contextlib.nullcontext():
                tokens(asked[2])
        while engine.busy:
            engine.step()
        restored = engine.stats()["restored_blocks"]
        assert [tokens(one) for one in asked] == want
        assert engine.stats()["host_blocks"] >= held and engine.stats()["restored_blocks"] > restored
        engine.kv_connector.transfer.host.check_invariants()
        check_settled(engine)


def test_engine_on_a_mesh_is_reset_too(model, plain, monkeypatch):
    asked = [Request(prompt, GREEDY) for prompt in PROMPTS]
    engine_harness.reset_cache(plain)
    want = [answer.tokens for answer in drive(plain, asked)]
    limits = dataclasses.replace(LIMITS, max_num_seqs=2, max_num_batched_tokens=16)
    engine = Engine(
        model,
        limits,
        config.Cache(kv_cache_tokens=768),
        data_parallel.data_parallel_group(config.Mesh("serve"), jax.devices()[:2]),
    )
    with monkeypatch.context() as patch:
        patch.setattr(model_steps, "decode", failing(model_steps.decode, after=True, skip=1))
        with pytest.raises(Injected):
            drive(engine, asked)
    for id in range(len(asked)):
        engine.abort_request(id)
    assert [answer.tokens for answer in drive(engine, asked)] == want


def test_engine_of_several_processes_says_that_an_error_is_final(model, monkeypatch):
    engine = Engine(model, LIMITS)
    engine.add_request(0, [5], GREEDY)
    with monkeypatch.context() as patch:
        patch.setattr(model_steps, "prefill", failing(model_steps.prefill))
        with pytest.raises(Injected):
            engine.step()
    monkeypatch.setattr(data_parallel.DataParallelGroup, "processes", [0, 1])
    for call in (engine.step, engine.stats, lambda: engine.busy, lambda: engine.add_request(1, [5], GREEDY)):
        with pytest.raises(Exception, match="failed in one of its 2 processes") as error:
            call()
        assert "\n" not in str(error.value)
    engine.close()


def test_interrupt_ends_a_call_while_its_step_is_still_under_way(llm, answers, monkeypatch):
    """As while a program is compiled for a minute: the caller does not wait for that."""
    inside, gate, step = threading.Event(), threading.Event(), Engine.step

    def slow(engine):
        if threading.current_thread() is not threading.main_thread() and not gate.is_set():
            inside.set()
            os.kill(os.getpid(), signal.SIGINT)  # its handler runs in the main thread
            assert gate.wait(60)
        return step(engine)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests may ignore it
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", slow)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, GREEDY)
        assert inside.is_set() and llm.engine_loop._driving.locked()
        gate.set()
    signal.signal(signal.SIGINT, before)
    works(llm, answers)


def test_interrupts_of_a_caller_leave_a_sound_llm(model):
    with interrupts.small_llm(model) as llm:
        assert interrupts.generate(llm, 8)["struck"] > 0


def test_interrupts_of_one_thread_are_not_noticed_by_others(model):
    with interrupts.small_llm(model) as llm:
        interrupts.generate(llm, 4, others=3)


def test_interrupts_inside_a_step_leave_a_sound_engine(model):
    with tiered(model, host=1 << 24) as engine:
        tally = interrupts.step(engine, 12)
    assert tally["struck"] > 6 and tally["resets"] > 6


def test_an_llm_that_nobody_holds_is_freed(model, tokenizer):
    llm = LLM(model, tokenizer=tokenizer, **OPTIONS)
    stream = llm.stream(PROMPTS, dataclasses.replace(GREEDY, max_tokens=200))
    next(stream)
    thread, gone = llm.engine_loop._shared.thread, weakref.ref(llm.engine)
    del llm, stream
    thread.join(60)
    gc.collect()
    assert not thread.is_alive() and gone() is None
