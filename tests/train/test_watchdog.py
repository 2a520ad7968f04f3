"""The hang detector reports what hangs, and nothing else."""

import pathlib
import subprocess
import sys
import textwrap
import time

from v4jax.train.watchdog import EXIT, Watchdog

ROOT = pathlib.Path(__file__).parents[2]


class Step:
    """A step's result whose readiness the test sets."""

    def __init__(self, ready: bool):
        self.ready = ready

    def is_ready(self) -> bool:
        return self.ready


def wait_for(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


def test_a_hang_writes_all_stacks_and_compiling_or_saving_does_not(tmp_path, capfd):
    path = tmp_path / "hang.txt"
    with Watchdog(0.2, path) as watchdog:
        first = Step(False)
        watchdog.started(1, first)
        time.sleep(0.5)  # the first step compiles as long as it likes
        assert not path.exists()
        first.ready = True
        wait_for(lambda: watchdog._ended is not None)
        with watchdog.paused():
            time.sleep(0.5)
        assert not path.exists()
        watchdog.started(2, Step(False))
        wait_for(path.exists)
        wait_for(lambda: "test_watchdog.py" in path.read_text())
    assert "the last was step 1" in path.read_text() and "in wait_for" in path.read_text()
    assert "no step has ended for 0.2 s" in capfd.readouterr().err


def test_off_starts_nothing(tmp_path):
    with Watchdog(0, tmp_path / "hang.txt") as watchdog:
        watchdog.started(1, Step(True))
        assert not watchdog._thread.is_alive()


def test_leaving_ends_a_process_that_hangs(tmp_path):
    program = textwrap.dedent("""
        import pathlib, sys, threading
        from v4jax.train.watchdog import Watchdog
        class Done:
            def is_ready(self): return True
        with Watchdog(0.2, pathlib.Path(sys.argv[1]), leave=True) as watchdog:
            watchdog.started(1, Done())
            threading.Event().wait()
    """)
    path = tmp_path / "hang.txt"
    ended = subprocess.run([sys.executable, "-c", program, path], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == EXIT and "all threads" in ended.stderr and "<string>" in path.read_text()
