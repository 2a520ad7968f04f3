"""Progress of a run on the terminal: loss, tokens a second, time left."""

from __future__ import annotations

import contextlib
import sys
import time

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
            rp.TextColumn("{task.description}"), rp.BarColumn(), rp.MofNCompleteColumn(),
            rp.TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s"), rp.TimeRemainingColumn(),
        )  # fmt: skip
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

    def _left(self, step: int) -> str:
        seconds = (self.steps - step) * self.tokens_per_step / self.tokens_per_second
        return f"  {int(seconds // 60)}:{int(seconds % 60):02d} left"

    @contextlib.contextmanager
    def pause(self, why: str):
        """Time inside does not count into the speed."""
        begun = time.monotonic()
        self._bar.update(self._task, description=f"{self.name} ({why})")
        yield
        self._bar.update(self._task, description=self.name)
        self._paused += time.monotonic() - begun
