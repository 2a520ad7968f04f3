"""Metrics of a training run: JSON lines, TensorBoard events and a plot of the loss."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from v4jax.core import untrusted_json
from v4jax.core.atomic import write_error
from v4jax.core.errors import UserError

_MOST = 1 << 30  # maximum size of a metrics file in bytes, enough for millions of records
_EVENTS = ("started", "rolled_back_from")  # events of the run's history; they are not plotted, as they form no curve
_SMOOTH = 0.95  # the smoothed curve weights a record at distance n by _SMOOTH**n


@contextlib.contextmanager
def write_errors(path: pathlib.Path) -> Iterator[None]:
    """Turn an OSError of a write to `path`, or to a file in it, into a one-line UserError."""
    try:
        yield
    except OSError as error:
        raise write_error(error.filename or path, error, "the checkpoints are good") from error


class MetricsWriter:
    """Appends one record per step to `metrics.jsonl`, and the same scalars to TensorBoard events.

    The constructor drops the records of steps after `resume_step`, because a resumed run repeats those steps, and
    every damaged line. A file that cannot be read as a whole (larger than 1 GiB, or no regular file) is renamed, and
    the records begin anew, because no state of the metrics may stop a run.

    Args:
      workdir: Directory of the run.
      resume_step: Last step of the checkpoint from which the run continues; 0 in a new run.

    Attributes:
      notice: What the constructor dropped or renamed, as text; "" if nothing.

    Raises:
      UserError: The files cannot be written; every method may raise it.
    """

    def __init__(self, workdir: pathlib.Path, resume_step: int):
        from tensorboardX import SummaryWriter  # imports torch if it is installed, so import it only for training

        self._path = workdir / "metrics.jsonl"
        try:
            self.notice = self._forget_after(resume_step)
            self._file = self._path.open("a", encoding="utf-8")
            self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1)
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error.strerror}; move it away or mend its rights") from error

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append the record {"step": step, name: value, ...}.

        Values that are not finite are left out, because JSON cannot represent them.
        """
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        with write_errors(self._path):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            if name not in _EVENTS:
                self._events.add_scalar(name, value, step)

    def flush(self) -> None:
        """Flush the buffered records and events to the operating system."""
        with write_errors(self._path):
            self._file.flush()
            self._events.flush()

    def close(self) -> None:
        """Flush and close both files."""
        with write_errors(self._path):
            try:
                self._file.close()
            finally:  # ends the thread of the event writer
                self._events.close()

    def _forget_after(self, step: int) -> str:
        """Drop the records of steps after `step` and the damaged lines, or rename a file that cannot be read.

        Returns:
          The notice. It counts a last line that a kill cut short as damaged.
        """
        if not os.path.lexists(self._path):
            return ""
        try:
            data = untrusted_json.read_bytes(self._path, _MOST)
        except (OSError, untrusted_json.JsonError) as error:
            reason = getattr(error, "strerror", None) or error
            return f"it cannot be read ({reason}); it is now {self._set_aside()}, and the records begin anew"
        records, damaged = _parse(data)
        partial = self._path.with_suffix(".partial")
        kept = [json.dumps(record) + "\n" for record in records if record["step"] <= step]
        partial.write_text("".join(kept), encoding="utf-8")
        partial.replace(self._path)
        return f"{damaged} damaged lines are left out" if damaged else ""

    def _set_aside(self) -> str:
        """Rename the file to the first free name of metrics.jsonl.1, metrics.jsonl.2 and so on; returns that name."""
        names = (self._path.with_name(f"{self._path.name}.{number}") for number in itertools.count(1))
        aside = next(name for name in names if not os.path.lexists(name))
        self._path.rename(aside)
        return aside.name


def read_metrics(path: pathlib.Path) -> list[dict[str, float]]:
    """Read the records of a metrics file.

    Damaged lines are skipped, and so is a last line without a line break.

    Raises:
      UserError: `path` cannot be read as a file.
    """
    try:
        return _parse(untrusted_json.read_bytes(path, _MOST))[0]
    except (OSError, untrusted_json.JsonError) as error:
        raise UserError(f"cannot read {path}: {error}; move it away") from error


def _parse(data: bytes) -> tuple[list[dict[str, float]], int]:
    """Return the records, and the number of lines that hold no valid record."""
    lines = data.split(b"\n")
    records = [_record(line) for line in lines[:-1]]  # text after the last line break was cut short
    good = [record for record in records if record is not None]
    return good, len(records) - len(good) + bool(lines[-1])


def _record(line: bytes) -> dict[str, float] | None:
    """Return the record of a line, or None unless it is an object with a step whose values are all finite numbers."""
    try:
        record = untrusted_json.parse(line)
        step, values = record["step"], record.values()
        good = type(step) is int and step >= 0 and all(type(v) in (int, float) and math.isfinite(v) for v in values)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None
    return record if good else None


def smooth(values: Sequence[float]) -> np.ndarray:
    """Smooth a curve with a two-sided exponential moving average whose weights sum to 1.

    A one-sided average lags behind a falling loss, and an average that starts at zero is too low at first. The
    two-sided average reproduces a straight line exactly, except near the ends, where one side is cut off.

    Args:
      values: Values at equal distances.

    Returns:
      float64 [len(values)].
    """
    array = np.asarray(values, np.float64)
    total, weight = array.copy(), np.ones(len(array))
    for turned in (slice(None), slice(None, None, -1)):
        sums = weights = 0.0
        for i in range(len(array))[turned]:
            total[i] += sums
            weight[i] += weights
            sums, weights = _SMOOTH * (sums + array[i]), _SMOOTH * (weights + 1.0)
    return total / weight


def plot_loss(workdir: pathlib.Path, heldout: dict[int, float]) -> pathlib.Path:
    """Plot the run's metrics to `loss.png` in `workdir`.

    The plot shows the training loss by step (raw and smoothed), the held-out loss, and below them the learning rates
    and the tokens per second.

    Args:
      workdir: Directory of the run, which holds metrics.jsonl.
      heldout: Held-out loss in nats per token, by the step at which it was measured.

    Returns:
      Path of the plot.
    """
    from matplotlib.figure import Figure

    records = read_metrics(workdir / "metrics.jsonl")

    def column(name: str) -> tuple[list[float], list[float]]:
        found = [(record["step"], record[name]) for record in records if name in record]
        return [step for step, _ in found], [value for _, value in found]

    figure = Figure(figsize=(8, 7.5), layout="constrained")
    loss, rate, speed = figure.subplots(3, sharex=True, height_ratios=(4, 1, 1))
    steps, losses = column("loss")
    loss.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8, label="training")
    loss.plot(steps, smooth(losses), color="tab:blue", label="training, smoothed")
    if heldout:
        loss.plot(list(heldout), list(heldout.values()), "o--", color="tab:orange", label="held out")
    loss.set(ylabel="cross-entropy (nats a token)", title="Loss")
    rate.plot(*column("lr"), color="tab:green", label="matrices (Muon)")
    rate.plot(*column("adam_lr"), "--", color="tab:olive", label="the rest (AdamW)")
    rate.set(ylabel="learning rate")
    speed.plot(*column("tokens_per_second"), color="tab:gray")
    speed.set(xlabel="step", ylabel="tokens/s", ylim=(0, None))
    for axes in (loss, rate, speed):
        axes.grid(alpha=0.3)
    loss.legend()
    rate.legend()
    path = workdir / "loss.png"
    figure.savefig(path, dpi=120)
    return path
