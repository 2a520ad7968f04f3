"""Signals: what is deferred, what ends at once, and real runs that are stopped at random moments."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from tests.train import interrupts
from v4jax.train.stop_signals import StopSignals

ROOT = pathlib.Path(__file__).parents[2]


def send(signum):
    os.kill(os.getpid(), signum)
    time.sleep(0.01)  # Python runs the handler here at the latest


def heed_sigint():
    """A shell starts its background jobs, such as these tests, with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def handlers_stay():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), signal.set_wakeup_fd(-1)
    yield
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), signal.set_wakeup_fd(-1)) == before


def test_where_nothing_is_lost_a_signal_raises_at_once():
    with StopSignals() as stop, pytest.raises(SystemExit) as ended:
        send(signal.SIGTERM)
    assert ended.value.code == 143 and stop.asked == signal.SIGTERM
    with StopSignals() as stop, pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)
    with StopSignals() as stop:
        with contextlib.suppress(SystemExit):  # as a destructor loses an exception
            send(signal.SIGTERM)
        with pytest.raises(SystemExit):
            stop.check()


def test_a_deferred_signal_waits_and_only_a_second_ctrl_c_does_not(capfd):
    with StopSignals() as stop:
        stop.deferred = True
        for signum in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            send(signum)
        stop.check()
        assert stop.asked == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        with pytest.raises(SystemExit):
            stop.leave()
    assert capfd.readouterr().err.count("SIGTERM: the run is saved after this step and ends") == 1
    with StopSignals() as stop:
        stop.deferred = True
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            stop.leave()


def test_of_several_processes_ctrl_c_is_handed_on_as_sigterm():
    got = []
    with StopSignals() as stop:
        stop.shared = True
        signal.signal(signal.SIGTERM, lambda *_: got.append("SIGTERM"))  # as JAX's own handler does
        send(signal.SIGINT)
        stop.check()
        assert got == ["SIGTERM"] and stop.asked == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            stop.leave()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_jax_keeps_its_handler_where_it_came_first():
    """A program joins the processes itself and then calls `train`: only JAX's handler makes all of them stop."""
    got = []
    before = signal.signal(signal.SIGTERM, lambda *_: got.append("SIGTERM"))
    try:
        with StopSignals(shared=True):
            send(signal.SIGTERM)
            send(signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert got == ["SIGTERM"] * 2


def test_what_the_caller_ignores_stays_ignored_and_threads_install_nothing():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            send(signal.SIGINT)
        assert stop.asked is None and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    entered = []
    thread = threading.Thread(target=lambda: entered.append(StopSignals(exits=True).__enter__()._previous))
    thread.start()
    thread.join()
    assert entered == [{}]


PROGRAM = textwrap.dedent("""
    import hashlib, sys, time
    from v4jax.train.stop_signals import StopSignals
    class Slow:
        def __del__(self):  # Python drops what is raised in here
            print("running", flush=True)
            time.sleep(60)
    with StopSignals(exits=True, patience=600 if sys.argv[1] in ("deferred", "in a destructor") else 0.2) as stop:
        stop.last_words = lambda: "the last words" if sys.argv[1] != "the workdir is gone" else open("gone/checkpoints")
        stop.deferred = sys.argv[1] == "deferred"
        if sys.argv[1] == "in a destructor":
            Slow()
        print("running", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes inside C, as compiling is
""")


@pytest.mark.parametrize(
    "where, signals, code, message",
    [
        ("deferred", [signal.SIGINT, signal.SIGINT], 130, "ended at once"),
        ("blocked", [signal.SIGTERM], 143, "the last words"),
        ("blocked", [signal.SIGINT], 130, "the last words"),
        ("the workdir is gone", [signal.SIGTERM], 143, "nothing"),
        ("in a destructor", [signal.SIGTERM], 143, "the last words"),
        ("in a destructor", [signal.SIGINT], 130, "the last words"),
    ],
)
def test_the_command_line_ends_wherever_its_main_thread_is(where, signals, code, message):
    command = [sys.executable, "-c", PROGRAM, where]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_sigint
    ) as process:
        try:
            assert process.stdout.readline() == "running\n"
            for signum in signals:
                time.sleep(0.3)
                assert process.poll() is None, "one Ctrl-C alone waits for what is deferred"
                process.send_signal(signum)
            output = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert process.returncode == code
    assert [line for line in output.splitlines() if line] == [line for line in output.splitlines() if message in line]


def test_runs_stopped_at_random_moments_resume_to_the_bit(tmp_path):
    """More of them: `python -m tests.train.interrupts --count=50`."""
    assert interrupts.trials(2, [signal.SIGTERM, signal.SIGINT], tmp_path, seed=1).total() == 2
