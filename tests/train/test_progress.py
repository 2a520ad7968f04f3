"""Progress of a run: a bar or a spinner on a terminal, else lines."""

import io
import sys
import time

from v4jax.train.progress import Progress, spinner


class Terminal(io.StringIO):
    """A stderr that is a terminal."""

    def isatty(self) -> bool:
        return True


def wait_for(terminal, text):
    end = time.monotonic() + 30
    while text not in terminal.getvalue():
        assert time.monotonic() < end, terminal.getvalue()
        time.sleep(0.02)


def test_loading_and_compiling_spin_on_a_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)  # not in a fixture: pytest puts its own in place when the test begins
    with spinner("loading the data"):
        wait_for(terminal, "loading the data")
    assert "\x1b[?25h" in terminal.getvalue(), "the cursor is back"
    with Progress("tiny", 0, 10, 64) as progress, progress.pause("compiling", line=True):
        wait_for(terminal, "tiny (compiling)")
    assert "tiny: compiling" not in terminal.getvalue()


def test_loading_and_compiling_are_lines_elsewhere(capsys):
    with spinner("loading the data"), Progress("tiny", 0, 10, 64) as progress:
        with progress.pause("compiling", line=True):
            assert capsys.readouterr().err == "loading the data\ntiny: compiling\n"
        with progress.pause("evaluating"):
            pass
    with spinner("loading the data", show=False), Progress("tiny", 0, 10, 64, show=False) as progress:
        with progress.pause("compiling", line=True):
            pass
    assert capsys.readouterr().err == ""
