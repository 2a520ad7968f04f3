"""What a run leaves behind to look at: JSON lines, TensorBoard events, a loss plot."""

from __future__ import annotations

import json
import pathlib


class MetricsWriter:
    """Appends one record a step to `metrics.jsonl` and the same scalars to TensorBoard events."""

    def __init__(self, workdir: pathlib.Path, resume_step: int):
        from tensorboardX import SummaryWriter  # imports torch where that is installed: only when training

        self._path = workdir / "metrics.jsonl"
        self._forget_after(resume_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One record: {"step": step, name: value, ...}."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def flush(self) -> None:
        """Hand everything written so far to the operating system."""
        self._file.flush()
        self._events.flush()

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
        self._events.close()

    def _forget_after(self, step: int) -> None:
        """Drop records of steps that a resumed run will do again, and a last line cut short by a kill."""
        if self._path.exists():
            kept = [record for record in read_metrics(self._path) if record["step"] <= step]
            partial = self._path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
            partial.replace(self._path)


def read_metrics(path: pathlib.Path) -> list[dict[str, float]]:
    """The records of a metrics file; a last line cut short is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def plot_loss(workdir: pathlib.Path, heldout: dict[int, float]) -> pathlib.Path:
    """`loss.png`: training loss by step (raw and smoothed), and held-out loss (nats a token) where it was measured."""
    from matplotlib.figure import Figure

    records = [record for record in read_metrics(workdir / "metrics.jsonl") if "loss" in record]
    steps, losses = [record["step"] for record in records], [record["loss"] for record in records]
    smooth, average = [], 0.0
    for count, value in enumerate(losses, start=1):
        average = 0.95 * average + 0.05 * value
        smooth.append(average / (1 - 0.95**count))  # the average starts at zero
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8, label="training")
    axes.plot(steps, smooth, color="tab:blue", label="training, smoothed")
    if heldout:
        axes.plot(list(heldout), list(heldout.values()), "o--", color="tab:orange", label="held out")
    axes.set(xlabel="step", ylabel="cross-entropy (nats a token)", title="Loss")
    axes.grid(alpha=0.3)
    axes.legend()
    path = workdir / "loss.png"
    figure.savefig(path, dpi=120)
    return path
