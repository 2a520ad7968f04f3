"""The times of one `generate`: compilation is counted apart, once, wherever its events lie."""

import time

import pytest

from v4jax.core import timing
from v4jax.core.timing import GenerationTimer


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [100.0]
    monkeypatch.setattr(timing.time, "monotonic", lambda: now[0])
    return now


def events(clock, timer, *steps):
    """Pieces that arrive after `steps`: (seconds that pass, of them compiling)."""
    for index, (seconds, compiling) in enumerate(steps):
        clock[0] += compiling
        if compiling:  # the inner event ends first and is inside the outer one
            timer._compiled("/jax/core/compile/jaxpr_trace_duration", compiling / 2)
            timer._compiled("/jax/core/compile/backend_compile_duration", compiling)
        timer._compiled("/jax/other", 1000.0)
        clock[0] += seconds - compiling
        yield 0, f"piece {index}"


def test_compilation_is_left_out_of_ttft_and_of_the_rate(clock):
    timer = GenerationTimer()
    pieces = timer.watch(events(clock, timer, (5.0, 4.0), (3.0, 2.0), (1.0, 0.0)))
    assert [piece for _, piece in pieces] == ["piece 0", "piece 1", "piece 2"]
    assert timer.summary(7, 5) == (
        "7 prompt tokens, 5 generated; TTFT 1.00 s; then 2.0 tokens/s (and 6.0 s of compilation)"
    )


def test_nothing_generated_has_no_rate(clock):
    timer = GenerationTimer()
    assert list(timer.watch(iter(()))) == []
    assert timer.summary(7, 1) == "7 prompt tokens, 1 generated; TTFT 0.00 s"


def test_the_events_are_those_of_jax():
    import jax

    with GenerationTimer() as timer:
        list(timer.watch((0, str(jax.jit(lambda x, n=n: x * n)(1.0))) for n in (time.time(), 2.0)))
    seen = len(timer._spans)
    assert seen >= 2  # tracing and compiling
    jax.jit(lambda x: x - 3.0)(1.0)
    assert len(timer._spans) == seen, "no listener is left"
