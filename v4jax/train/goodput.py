"""Goodput: the share of a run's wall-clock time that went into training steps whose results the run kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping


class Goodput:
    """Sums the times of steps and divides them by the time since the run began.

    Everything else lowers the share: startup, compilation, restoring, evaluation, saving, the time between two
    processes of a run, and repeated steps. The first execution of a repeated step does not count, because its record
    was dropped from metrics.jsonl.

    Args:
      records: Records of the run so far, from metrics.jsonl. "started" is the time at which a process began, in
        seconds since 1970, and "seconds" is the time of a step.
      clock: Returns the current time in seconds since 1970.
    """

    def __init__(self, records: Iterable[Mapping[str, float]], clock: Callable[[], float] = time.time):
        self._clock, records = clock, list(records)
        self._began = min((record["started"] for record in records if "started" in record), default=clock())
        self._steps = sum(record.get("seconds", 0.0) for record in records)
        self._mark = clock()

    def start_timer(self) -> None:
        """Set the mark to now, so that the time before does not count as steps."""
        self._mark = self._clock()

    def steps(self, count: int) -> float:
        """Count the time since the mark as `count` finished steps, and set the mark to now.

        Returns:
          Seconds per step.
        """
        now = self._clock()
        taken, self._mark = max(now - self._mark, 0.0), now
        self._steps += taken
        return taken / count

    def share(self) -> float:
        """Return the goodput from the start of the run to the mark, 0 to 1."""
        return min(self._steps / max(self._mark - self._began, 1e-9), 1.0)
