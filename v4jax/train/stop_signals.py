"""Stop signals of a training run: a scheduler's SIGTERM, and Ctrl-C.

The module imports no jax, so that signals are handled before jax is imported.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

_SHOW_CURSOR = b"\x1b[?25h"  # a progress bar hides it


class StopSignals:
    """Context manager that turns SIGTERM and SIGINT into an orderly end of the run.

    While `deferred` is False, a signal ends the run at once. `deferred` is False where nothing would be lost: before
    the first step and after the last checkpoint. While `deferred` is True, a signal only sets `asked`; the training
    loop saves a checkpoint and then calls `leave`. A second SIGINT always ends the run at once. Further SIGTERMs have
    no effect, because schedulers and launchers repeat SIGTERM.

    In a run of several processes (`shared` is True), no signal ends the run before the second SIGINT. JAX's own
    handler of SIGTERM makes all processes stop after the same step, and this class passes SIGINT on to it as SIGTERM.

    A signal that the caller ignores (`nohup`, a background job of a script) stays ignored. Outside the main thread no
    handler is installed.

    Args:
      exits: Whether the process belongs to the run, as on the command line. If True, ending at once means to end the
        process with status 143 or 130. If False, it means to raise SystemExit(143) or KeyboardInterrupt in the main
        thread. Such an exception may get lost: imports, destructors and JAX's callbacks drop exceptions or turn them
        into others.
      patience: Seconds until a process is ended whose main thread is inside a long call that delays signal handlers
        (compiling, waiting for a device). After a second SIGINT the process is ended without this wait.
      shared: Whether JAX has joined several processes already. Its handler of SIGTERM then stays installed.

    Attributes:
      asked: Number of the first signal, or None.
      deferred: Whether a signal waits for the training loop to save.
      shared: Whether the run has several processes.
      last_words: Returns the line that a process prints when it ends at once.
    """

    def __init__(self, exits: bool = False, patience: float = 5.0, shared: bool = False):
        self.asked: int | None = None
        self.deferred = False
        self.shared = shared
        self.last_words: Callable[[], str] = lambda: "stopped before anything was computed"
        self._exits, self._patience = exits, patience
        self._interrupts = 0
        self._previous: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}
        self._wakeup: tuple[int, int, int] | None = None  # read end, write end, previous wakeup descriptor

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            return self
        if self._exits:
            self._start_watching()
        for signum in (signal.SIGINT,) if self.shared else (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(signum) is not signal.SIG_IGN:
                self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for signum, handler in self._previous.items():
            if not (self.shared and signum == signal.SIGTERM):  # JAX replaced this handler by its own
                signal.signal(signum, handler)
        if self._wakeup is not None:
            read_end, write_end, before = self._wakeup
            signal.set_wakeup_fd(before)
            os.close(write_end)  # the watching thread then ends and closes the read end

    def check(self) -> None:
        """Raise the exception of a signal again, in case the exception of its handler was dropped."""
        if self.asked is not None and not self.deferred and not self.shared:
            self.leave()

    def leave(self) -> NoReturn:
        """Raise KeyboardInterrupt if the first signal was SIGINT, else SystemExit(143)."""
        if self.asked == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + signal.SIGTERM)

    def _handle(self, signum: int, _) -> None:
        first, self.asked = self.asked is None, self.asked or signum
        self._interrupts += signum == signal.SIGINT
        if self._interrupts > 1:
            self._end_at_once(signal.SIGINT)
        elif self.shared and signum == signal.SIGINT:
            os.kill(os.getpid(), signal.SIGTERM)
        elif not self.deferred and not self.shared:
            self._end_at_once(self.asked)
        if first:
            again = ", Ctrl-C again ends at once" if signum == signal.SIGINT else ""
            _say(f"{signal.Signals(signum).name}: the run is saved after this step and ends{again}")

    def _end_at_once(self, signum: int) -> NoReturn:
        if self._exits:
            _end(128 + signum, self.last_words)
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + signal.SIGTERM)

    # --- the thread that ends the process while the main thread cannot run signal handlers -------------------------

    def _start_watching(self) -> None:
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        # Python's C handler writes the number of every signal to this descriptor, whatever the main thread is doing.
        self._wakeup = read_end, write_end, signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(read_end,), name="stop signals", daemon=True).start()

    def _watch(self, read_end: int) -> None:
        interrupts, deadline, code = 0, None, 0
        while True:
            wait = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([read_end], [], [], wait)[0]:
                deadline = None
                if not self.deferred and not self.shared:
                    _end(code, self.last_words)
                continue
            signals = os.read(read_end, 64)
            if not signals:
                os.close(read_end)
                return
            for signum in signals:
                interrupts += signum == signal.SIGINT
                if signum in self._previous and deadline is None and not self.deferred:
                    deadline, code = time.monotonic() + self._patience, 128 + signum
            if interrupts > 1:
                _end(128 + signal.SIGINT, lambda: "ended at once; the newest finished checkpoint is as it was")


def _say(line: str) -> None:
    """Write to stderr without Python's buffer, because the interrupted code may be using that buffer."""
    try:
        os.write(2, f"\nv4jax: {line}\n".encode())
    except OSError:
        pass  # the terminal is gone; the run must still be saved


def _end(code: int, line: Callable[[], str]) -> NoReturn:
    try:
        if sys.stderr is not None and sys.stderr.isatty():
            os.write(2, _SHOW_CURSOR)
        _say(line())
    finally:  # the terminal or the workdir may be gone, and the process must end nevertheless
        os._exit(code)
