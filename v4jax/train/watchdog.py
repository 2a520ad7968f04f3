"""Hang detector: says where every thread stands when no step has ended for too long."""

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

EXIT = 75  # status of a process that ended itself: "try again", as sysexits.h has it
_POLLS = 20  # looks in the time after which a run counts as hung


class Result(Protocol):
    """What a step will give: a jax.Array."""

    def is_ready(self) -> bool:
        """Whether it is computed, without waiting for it."""


class Watchdog:
    """A thread that looks whether steps end; a context manager. seconds 0: no thread, every method does nothing.

    When no step has ended for `seconds`, the stacks of all threads go to stderr and are added to the file `path`; then
    the process ends with status 75 if `leave`, else the next report comes after as long again. It wakes up when the
    first step ends, so compiling never counts, and time inside `paused` does not either. Being a Python thread it can't
    see a hang that keeps the interpreter's lock; waiting for devices, files and peers does not.
    """

    def __init__(self, seconds: float, path: pathlib.Path, leave: bool = False):
        self._seconds, self._path, self._leave = seconds, path, leave
        self._lock = threading.Lock()
        self._running: deque[tuple[int, Result]] = deque()
        self._ended: float | None = None  # when a step last did; None while nothing is expected to
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
        """A step is under way; `result` is one of its values, which nobody donates."""
        if self._seconds > 0:
            with self._lock:
                self._running.append((step, result))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around what takes its own time: evaluating, saving, restoring. All steps have ended before."""
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
                out.write(text)
                out.flush()
                faulthandler.dump_traceback(out, all_threads=True)
        if self._leave:
            os._exit(EXIT)  # the main thread hangs: nothing else ends the process, and its peers with it
        with self._lock:
            self._ended = time.monotonic()
