"""What a run leaves behind to look at: JSON lines, TensorBoard events, a loss plot."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Sequence

import numpy as np

from v4jax.core import untrusted_json
from v4jax.core.errors import UserError

_MOST = 1 << 30  # bytes of a file: millions of records
_EVENTS = ("started", "rolled_back_from")  # marks of the run's history: a curve of them says nothing
_SMOOTH = 0.95  # weight of a record's neighbor in the smoothed curve, that of the next one its square


class MetricsWriter:
    """Appends one record a step to `metrics.jsonl` and the same scalars to TensorBoard events.

    Opening drops the records of steps after `resume_step`, which a resumed run does again, and every damaged line.
    Raises UserError if the files cannot be written.
    """

    def __init__(self, workdir: pathlib.Path, resume_step: int):
        from tensorboardX import SummaryWriter  # imports torch where that is installed: only when training

        self._path = workdir / "metrics.jsonl"
        try:
            self.damaged = self._forget_after(resume_step)
            self._file = self._path.open("a", encoding="utf-8")
            self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1)
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error.strerror}; move it away or mend its rights") from error

    def write(self, step: int, values: dict[str, float]) -> None:
        """One record: {"step": step, name: value, ...}; a value that is not finite is left out, as JSON has none."""
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            if name not in _EVENTS:
                self._events.add_scalar(name, value, step)

    def flush(self) -> None:
        """Hand everything written so far to the operating system."""
        self._file.flush()
        self._events.flush()

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
        self._events.close()

    def _forget_after(self, step: int) -> int:
        """Returns how many damaged lines there were; one cut short by a kill counts."""
        if not self._path.exists():
            return 0
        records, damaged = _parse(_read(self._path))
        partial = self._path.with_suffix(".partial")
        kept = [json.dumps(record) + "\n" for record in records if record["step"] <= step]
        partial.write_text("".join(kept), encoding="utf-8")
        partial.replace(self._path)
        return damaged


def read_metrics(path: pathlib.Path) -> list[dict[str, float]]:
    """The records of a metrics file; lines that are damaged are left out, and so is a last one cut short.

    Raises UserError for what is no file.
    """
    return _parse(_read(path))[0]


def _read(path: pathlib.Path) -> bytes:
    try:
        return untrusted_json.read_bytes(path, _MOST)
    except (OSError, untrusted_json.JsonError) as error:
        raise UserError(f"cannot read {path}: {error}; move it away") from error


def _parse(data: bytes) -> tuple[list[dict[str, float]], int]:
    """Records, and the number of lines that hold none."""
    lines = data.split(b"\n")
    records = [_record(line) for line in lines[:-1]]  # what follows the last line break was cut short
    good = [record for record in records if record is not None]
    return good, len(records) - len(good) + bool(lines[-1])


def _record(line: bytes) -> dict[str, float] | None:
    """The record of a line; None unless it is an object with a step, all of whose values are finite numbers."""
    try:
        record = untrusted_json.parse(line)
        step, values = record["step"], record.values()
        good = type(step) is int and step >= 0 and all(type(v) in (int, float) and math.isfinite(v) for v in values)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None
    return record if good else None


def smooth(values: Sequence[float]) -> np.ndarray:
    """Exponential moving average to both sides of every value, its weights adding up to one: float64 [len(values)].

    An average over the past alone lags behind a falling loss, and one that starts at zero is too low at first. This one
    follows a straight line exactly, except near the ends, where one side is cut off.
    """
    values = np.asarray(values, np.float64)
    total, weight = values.copy(), np.ones(len(values))
    for turned in (slice(None), slice(None, None, -1)):
        sums = weights = 0.0
        for i in range(len(values))[turned]:
            total[i] += sums
            weight[i] += weights
            sums, weights = _SMOOTH * (sums + values[i]), _SMOOTH * (weights + 1.0)
    return total / weight


def plot_loss(workdir: pathlib.Path, heldout: dict[int, float]) -> pathlib.Path:
    """`loss.png`: training loss by step (raw and smoothed), held-out loss (nats a token) where it was measured, and
    below it the learning rates and the tokens per second."""
    from matplotlib.figure import Figure

    records = read_metrics(workdir / "metrics.jsonl")

    def column(name: str) -> tuple[list[int], list[float]]:
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
