"""Hang detector: dumps the stacks of all threads if no step has ended for too long."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pathlib
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Protocol

EXIT = 75  # exit status of a process that ended itself after a hang: EX_TEMPFAIL of sysexits.h, "try again"
_POLLS = 20  # number of polls in the time after which a run counts as hung


class Result(Protocol):
    """Result of a step that may still be running; jax.Array implements it."""

    def is_ready(self) -> bool:
        """Return whether the value is computed, without waiting for it."""
        ...


class Watchdog:
    """Context manager with a thread that checks whether steps end.

    If no step has ended for `seconds`, the thread writes the stacks of all threads to stderr and appends them to the
    file `path`. It then ends the process with status 75 if `leave` is True, else it reports again after another
    `seconds`. The time starts when the first step ends, so compilation does not count, and time inside `paused` does
    not count either. The watchdog is a Python thread, so it misses a hang that holds the GIL. Waiting for devices,
    files and other processes does not hold the GIL.

    Args:
      seconds: Time without a finished step that counts as a hang; 0 starts no thread and disables every method.
      path: File to which the stacks are appended.
      leave: Whether to end the process after the first report.
    """

    def __init__(self, seconds: float, path: pathlib.Path, leave: bool = False):
        self._seconds, self._path, self._leave = seconds, path, leave
        self._lock = threading.Lock()
        self._running: deque[tuple[int, Result]] = deque()
        self._ended: float | None = None  # monotonic time of the last end of a step; None while no step is expected
        self._step = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._seconds > 0:
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._closed.set()
        if self._seconds > 0:
            self._thread.join()

    def started(self, step: int, result: Result) -> None:
        """Register a step that was dispatched.

        Args:
          step: Number of the step.
          result: One of the arrays that the step computes. It must not be donated to another program.
        """
        if self._seconds > 0:
            with self._lock:
                self._running.append((step, result))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock during evaluation, saving or restoring. All registered steps must have ended before."""
        with self._lock:
            self._running.clear()
            watching, self._ended = self._ended is not None, None
        yield
        with self._lock:
            self._ended = time.monotonic() if watching else None

    def _watch(self) -> None:
        while not self._closed.wait(self._seconds / _POLLS):
            with self._lock:
                while self._running and self._running[0][1].is_ready():
                    self._step, self._ended = self._running.popleft()[0], time.monotonic()
                late = self._ended is not None and time.monotonic() - self._ended > self._seconds
            if late:
                self._report()

    def _report(self) -> None:
        text = f"v4jax: no step has ended for {self._seconds:g} s, the last was step {self._step}; all threads:\n"
        with self._path.open("a", encoding="utf-8") as file:
            for out in (file, sys.__stderr__):
                if out is None:  # a process without stderr
                    continue
                out.write(text)
                out.flush()
                faulthandler.dump_traceback(out, all_threads=True)
        if self._leave:
            os._exit(EXIT)  # the main thread hangs, so only this ends the process, and with it the other processes
        with self._lock:
            self._ended = time.monotonic()
