"""Interrupts at random moments: `python -m tests.serve.interrupts --count=200`.

Four ways, the first three with a host tier and so few pages that blocks move all the time:

* generate: a timer's signal handler raises in the main thread, which waits in `LLM.generate` or reads `LLM.stream`;
* threads: the same, while three other threads generate and must notice nothing;
* step: the main thread drives the engine itself, and KeyboardInterrupt strikes inside a step. Python delivers signals
  where calls begin and end; a profile function raises at one of these points, drawn from all those of a run;
* command: SIGINT to `v4jax generate`, from its first import on, which must end with status 130 and one line.

After each strike the same requests are run again, and must get their undisturbed answers; the cache must be free of
leaks, the host tier must be sound, and nothing may be on its way for ever.
"""

import argparse
import collections
import contextlib
import inspect
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time

import jax
import numpy as np

import v4jax
from tests.serve.engine_harness import LIMITS, MODEL, Request, check_settled, draw_model, drive, reset_cache
from tests.serve.offload_harness import LONG, tiered
from v4jax.data.tokenizer import Tokenizer
from v4jax.serve import LLM, SamplingParams

SOURCES = tuple(str(pathlib.Path(__file__).resolve().parents[2] / "v4jax" / name) for name in ("serve", "cache"))
PROMPTS = [np.random.default_rng(4).integers(3, MODEL.vocab_size, n).tolist() for n in (5, 300, 70, 1, 300, 12)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
GUARDS = ("host_to_device", "device_to_host", "device_to_device")


class Struck(BaseException):
    """What the timer's handler raises, as that of SIGALRM may."""


def guards():
    """The transfer guard's levels of this thread."""
    return [getattr(jax.config, f"jax_transfer_guard_{way}") for way in GUARDS]


def sound(engine):
    """Raise AssertionError for anything leaked, in the engine's state or on the way to the tiers."""
    check_settled(engine)
    assert engine.kv_connector.transfer.flush(LONG)
    assert not engine.kv_connector.transfer._coming
    engine.kv_connector.transfer.host.check_invariants()


@contextlib.contextmanager
def struck_after(seconds, signum):
    """Raise Struck in the main thread after the given number of seconds, unless the block has ended."""
    armed = True

    def strike(*_):
        if armed:
            raise Struck

    before = signal.signal(signum, strike)
    timer = threading.Timer(seconds, os.kill, [os.getpid(), signum])
    if signum == signal.SIGALRM:
        signal.setitimer(signal.ITIMER_REAL, seconds)
    else:
        timer.start()
    try:
        yield
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        timer.cancel()
        signal.signal(signum, before)


@contextlib.contextmanager
def small_llm(model):
    """An LLM with a host tier and few pages."""
    limits = {name: getattr(LIMITS, name) for name in ("max_num_seqs", "max_model_len", "max_num_batched_tokens")}
    with LLM(model, tokenizer=Tokenizer(), kv_host_bytes=1 << 24, kv_load_timeout_s=LONG, **limits) as llm:
        reset_cache(llm.engine, pages=3)
        yield llm


def generate(llm, count, seed=0, others=0):
    """Strike `count` calls of `generate` and `stream`; with `others`, while this many threads generate undisturbed."""
    rng, tally, before = np.random.default_rng(seed), collections.Counter(), guards()
    answers = lambda prompts: [out.token_ids for out in llm.generate(prompts, GREEDY)]
    want = answers(PROMPTS)
    start = time.perf_counter()
    assert answers(PROMPTS) == want
    seconds, over, wrong = time.perf_counter() - start, threading.Event(), []

    def undisturbed():
        try:
            while not over.is_set():
                assert answers(PROMPTS) == want
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=undisturbed) for _ in range(others)]
    for thread in threads:
        thread.start()
    for strike in range(count):
        signum = (signal.SIGALRM, signal.SIGUSR1)[strike % 2]
        try:
            with struck_after(rng.uniform(0, 1.1 * seconds), signum):
                if strike % 3:
                    assert answers(PROMPTS) == want
                else:
                    collections.deque(llm.stream(PROMPTS, GREEDY), maxlen=0)
                tally["in time"] += 1
        except Struck:
            tally["struck"] += 1
        assert answers(PROMPTS) == want
        if not others:
            sound(llm.engine)
    over.set()
    for thread in threads:
        thread.join()
    assert not wrong, wrong
    assert guards() == before
    llm.generate([[7]], GREEDY)
    sound(llm.engine)
    return tally


def step(engine, count, seed=0):
    """Strike `count` runs inside the engine's own calls."""
    rng, tally, before = np.random.default_rng(seed), collections.Counter(), guards()
    requests = [Request(prompt, GREEDY, join=2 * at) for at, prompt in enumerate(PROMPTS)]
    want = drive(engine, requests)
    points, _ = _profiled(lambda: drive(engine, requests), None)
    for _ in range(count):
        _, error = _profiled(lambda: drive(engine, requests), int(rng.integers(points)))
        if isinstance(error, KeyboardInterrupt):
            tally["struck"] += 1
        elif error is not None:
            raise error
        else:
            tally["in time"] += 1  # threads of the tiers make runs differ
        tally["resets"] += engine.broken
        for id in range(len(requests)):
            engine.abort_request(id)
        while engine.busy:
            engine.step()
        sound(engine)
        assert drive(engine, requests) == want
        sound(engine)
    assert guards() == before
    return tally


def command(model, count, seed=0):
    """Strike `count` processes of `v4jax generate` between their start and their end."""
    rng, tally = np.random.default_rng(seed), collections.Counter()
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = pathlib.Path(directory) / "model"
        v4jax.save(model, checkpoint, tokenizer=Tokenizer())
        code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); print(flush=True); "
        code += "from v4jax.__main__ import run; run()"
        argv = [
            sys.executable,
            "-c",
            code,
            "generate",
            f"--checkpoint={checkpoint}",
            "--prompt=a",
            "--max_tokens=50",
            "--max_model_len=576",
            "--kv_disk_bytes=1GiB",
            f"--kv_dir={directory}/kv",
        ]
        seconds = None
        for _ in range(1 + count):
            with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
                process.stdout.readline()
                start = time.perf_counter()
                if seconds is not None:
                    time.sleep(rng.uniform(0, seconds))
                    process.send_signal(signal.SIGINT)
                _, said = process.communicate(timeout=600)
            seconds = seconds or time.perf_counter() - start
            interrupted = said.rstrip().endswith("v4jax: interrupted")
            ends = ((130, True), (-signal.SIGINT, False), (0, False))  # -SIGINT: at Python's own end
            assert (process.returncode, interrupted) in ends, (process.returncode, said)
            assert "Traceback" not in said and "Exception" not in said, said
            tally[f"status {process.returncode}"] += 1
    return tally


def _profiled(run, at):
    """(points where a signal could strike in `run`, the exception that it ended with), raised at point number `at`."""
    points = 0

    def profile(frame, event, _):
        nonlocal points
        mine = frame.f_code.co_filename.startswith(SOURCES)
        # A generator that is closed is called once more, and drops what is raised.
        if mine and event in ("call", "c_return") and not frame.f_code.co_flags & inspect.CO_GENERATOR:
            points += 1
            if points - 1 == at:
                sys.setprofile(None)
                raise KeyboardInterrupt

    sys.setprofile(profile)
    try:
        run()
    except BaseException as error:
        return points, error
    finally:
        sys.setprofile(None)
    return points, None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200, help="strikes of each way, a quarter of them of processes")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    model = draw_model(0)
    with small_llm(model) as llm:
        print("generate:", dict(generate(llm, asked.count, asked.seed)), flush=True)
        print("threads:", dict(generate(llm, asked.count, asked.seed + 1, others=3)), flush=True)
    with tiered(model, host=1 << 24) as engine:
        print("step:", dict(step(engine, asked.count, asked.seed)), flush=True)
    print("command:", dict(command(model, asked.count // 4, asked.seed)), flush=True)
    print("every answer was right, and nothing leaked")


if __name__ == "__main__":
    main()
