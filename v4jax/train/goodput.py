"""Goodput: which share of the time since a run began went into steps that it kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping


class Goodput:
    """Adds up the times of steps. Everything else lowers the share: starting, compiling, restoring, evaluating, saving,
    time between two processes of a run, and steps that were done again, whose records are gone.

    records: what metrics.jsonl holds of the run so far, where "started" is the time at which a process began (seconds
    since 1970) and "seconds" the time of a step. clock: in seconds since 1970.
    """

    def __init__(self, records: Iterable[Mapping[str, float]], clock: Callable[[], float] = time.time):
        self._clock, records = clock, list(records)
        self._began = min((record["started"] for record in records if "started" in record), default=clock())
        self._steps = sum(record.get("seconds", 0.0) for record in records)
        self._mark = clock()

    def start_timer(self) -> None:
        """Steps begin now: what was before was none."""
        self._mark = self._clock()

    def steps(self, count: int) -> float:
        """`count` steps have ended since the mark, and others begin now. Returns the seconds of each."""
        now = self._clock()
        taken, self._mark = max(now - self._mark, 0.0), now
        self._steps += taken
        return taken / count

    def share(self) -> float:
        """Goodput until the mark, 0 to 1."""
        return min(self._steps / max(self._mark - self._began, 1e-9), 1.0)
