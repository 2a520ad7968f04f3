"""Progress of a run: a bar or a spinner on a terminal, else lines."""

import io
import sys
import time
import types

from v4jax.core.spinner import spinner
from v4jax.train.progress import Progress


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


def test_bars_and_spinners_are_ascii_on_an_ascii_terminal(monkeypatch):
    """Python escapes what stderr's encoding lacks, so other characters would show as \\u280b."""
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="backslashreplace", write_through=True)
    terminal.isatty = lambda: True
    shown = lambda: terminal.buffer.getvalue().decode("ascii")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "stderr", terminal)
    with spinner("loading the data"):
        wait_for(types.SimpleNamespace(getvalue=shown), "loading the data")
    with Progress("tiny", 0, 10, 64) as progress:
        progress.update(5, 2.5)
        wait_for(types.SimpleNamespace(getvalue=shown), "tiny")
    assert "loss 2.500" in shown() and "\\u" not in shown() and "\\x" not in shown()


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
