"""Statistics of the engine for a server that must not wait for a step, and whether the engine still makes steps."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

_INTERVAL = 2.0  # seconds between two readings while requests run
_MAX_FAILURES = 3  # steps in a row that failed, after which the engine counts as broken
_log = logging.getLogger(__name__)


class EngineMonitor:
    """Reads the statistics of an engine between two of its steps, in a thread of its own.

    A reading that takes longer than `timeout` means that a step is stuck. The thread is a daemon, so that a stuck
    engine does not keep the process.

    Args:
        read: returns the statistics; waits for the end of a step (`LLM.stats`).
        timeout: seconds after which a step counts as stuck.
    """

    def __init__(self, read: Callable[[], dict[str, float]], timeout: float):
        self._read, self._timeout = read, timeout
        self._stats: dict[str, float] = {}
        self._began: float | None = None  # when the reading that is under way began
        self._readings = 0
        self._asked = False  # a reading is asked for
        self._closed = False
        self._changed = threading.Condition()
        self._failures, self._error = 0, None
        self.running = 0  # engine requests; the server keeps it
        self._thread = threading.Thread(target=self._run, name="v4jax-monitor", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """End the thread after its current reading."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def stats(self) -> dict[str, float]:
        """Return the last statistics; {} before the first reading."""
        return self._stats

    def refresh(self, seconds: float) -> None:
        """Read anew and wait up to `seconds` for it. A stuck engine leaves the statistics as they are."""
        with self._changed:
            wanted = self._readings + (1 if self._began is None else 2)  # a reading under way may be too old
            self._asked = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._readings >= wanted or self._closed, seconds)

    def succeed(self) -> None:
        """Note that the engine has sent an output."""
        self._failures, self._error = 0, None

    def fail(self, error: BaseException) -> None:
        """Note that a step has failed with `error`. All requests of the step get the same exception."""
        if error is not self._error:
            self._failures, self._error = self._failures + 1, error

    @property
    def seconds_without_step(self) -> float:
        """Seconds that the reading under way has waited for the end of a step."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    @property
    def problem(self) -> str | None:
        """Why the engine serves no requests, as one line; None if it does."""
        if (stuck := self.seconds_without_step) > self._timeout:
            return f"the engine is stuck: it has made no step for {stuck:.0f} seconds"
        if self._failures >= _MAX_FAILURES:
            return f"the last {self._failures} steps of the engine failed with {type(self._error).__name__}"
        return None

    def _run(self) -> None:
        while self._wait():
            self._began = time.monotonic()
            try:
                stats = self._read()
            except Exception:
                _log.exception("the statistics of the engine cannot be read")
                stats = self._stats
            with self._changed:
                self._stats, self._began = stats, None
                self._readings += 1
                self._changed.notify_all()

    def _wait(self) -> bool:
        """Wait until a reading is due. Return whether the monitor is open."""
        with self._changed:
            due = self._changed.wait_for(lambda: self._asked or self._closed, _INTERVAL)
            while not due and not self.running:
                due = self._changed.wait_for(lambda: self._asked or self._closed, _INTERVAL)
            self._asked = False
            return not self._closed
