"""Progress of a run on the terminal: spinners, then loss, tokens a second, time left, and at the end where all is."""

from __future__ import annotations

import contextlib
import shlex
import sys
import time
from collections.abc import Iterator, Mapping

import rich.progress as rp


class Progress:
    """A bar on a terminal, a line every ten seconds elsewhere. Speed leaves out the first report, which compiled.

    show: False measures and prints nothing, in processes other than the first.
    """

    def __init__(self, name: str, done: int, steps: int, tokens_per_step: int, show: bool = True):
        self.name, self.steps, self.tokens_per_step = name, steps, tokens_per_step
        self.tokens_per_second: float | None = None
        self._mark: tuple[int, float] | None = None
        self._paused = 0.0
        self._printed = time.monotonic()
        self._show, self._live = show, show and sys.stderr.isatty()
        columns = (
            rp.SpinnerColumn(),
            rp.TextColumn("{task.description}"),
            rp.BarColumn(),
            rp.MofNCompleteColumn(),
            rp.TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s"),
            rp.TimeRemainingColumn(),
        )
        self._bar = rp.Progress(*columns, console=rp.Console(stderr=True), disable=not self._live)
        self._task = self._bar.add_task(name, total=steps, completed=done, loss="...", speed="...")

    def __enter__(self) -> Progress:
        self._bar.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._bar.__exit__(*exception)

    def update(self, step: int, loss: float) -> None:
        """Called with the values of a step that is really done (its loss has been read)."""
        now = time.monotonic()
        if self._mark is None:
            self._mark, self._paused = (step, now), 0.0
        elif step > self._mark[0]:
            seconds = now - self._mark[1] - self._paused
            self.tokens_per_second = (step - self._mark[0]) * self.tokens_per_step / max(seconds, 1e-9)
        speed = "..." if self.tokens_per_second is None else f"{self.tokens_per_second:,.0f}"
        self._bar.update(self._task, completed=step, loss=f"{loss:.3f}", speed=speed)
        if self._show and not self._live and (now - self._printed > 10 or step == self.steps):
            self._printed = now
            left = "" if self.tokens_per_second is None else self._left(step)
            print(
                f"{self.name} step {step}/{self.steps}  loss {loss:.3f}  {speed} tokens/s{left}",
                file=sys.stderr,
                flush=True,
            )

    def shorten(self, steps: int) -> None:
        """The run ends after `steps`."""
        self.steps = steps
        self._bar.update(self._task, total=steps)

    def _left(self, step: int) -> str:
        seconds = (self.steps - step) * self.tokens_per_step / self.tokens_per_second
        return f"  {int(seconds // 60)}:{int(seconds % 60):02d} left"

    @contextlib.contextmanager
    def pause(self, why: str, line: bool = False) -> Iterator[None]:
        """Time inside does not count into the speed. line: elsewhere than on a terminal, say it in a line."""
        begun = time.monotonic()
        self._bar.update(self._task, description=f"{self.name} ({why})")
        if line and self._show and not self._live:
            print(f"{self.name}: {why}", file=sys.stderr, flush=True)
        try:
            yield
        finally:
            self._bar.update(self._task, description=self.name)
            self._paused += time.monotonic() - begun


@contextlib.contextmanager
def spinner(text: str, show: bool = True) -> Iterator[None]:
    """Around something slow outside of a `Progress`: a spinner on a terminal, a line on stderr elsewhere."""
    if show and sys.stderr.isatty():
        with rp.Console(stderr=True).status(text):
            yield
        return
    if show:
        print(text, file=sys.stderr, flush=True)
    yield


def closing_lines(summary: Mapping[str, object]) -> str:
    """What a finished run prints: held-out loss, where its files lie, and the command to type next."""
    workdir = str(summary["checkpoint"])
    heldout = f"{summary['heldout_loss']:.4f} nats a token"
    command = f"v4jax eval --checkpoint={shlex.quote(workdir)} --suite=needle"
    if "heldout_bits_per_byte" in summary:  # text
        marks = f"xz {summary['xz_bits_per_byte']:.3f}, byte trigram {summary['trigram_bits_per_byte']:.3f}"
        heldout += f", {summary['heldout_bits_per_byte']:.3f} bits per byte ({marks})"
        command = f'v4jax generate --checkpoint={shlex.quote(workdir)} --prompt="Once upon a time"'
    rows = {
        "held-out loss": heldout,
        "checkpoint": workdir,
        "plot": str(summary["plot"]),
        "summary": f"{workdir}/summary.json",
        "next": command,
    }
    return "\n".join(f"{name:<15}{value}" for name, value in rows.items())
