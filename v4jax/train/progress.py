"""Progress of a run on the terminal: loss, tokens per second and time left."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

import rich.progress as rp
from rich.console import Console

from v4jax.core.spinner import spinner_name


class Progress:
    """Progress bar on a terminal; one line every 10 s if stderr is no terminal.

    The speed does not include the steps up to the first report, because they include compilation.

    Args:
      name: Label of the run.
      done: Steps finished before this process began.
      steps: Steps of the whole run.
      tokens_per_step: Tokens of one step, over all devices.
      show: Whether to print; False in every process but the first, which then only measures.

    Attributes:
      tokens_per_second: Mean speed since the first report, without pauses; None before the second report.
    """

    def __init__(self, name: str, done: int, steps: int, tokens_per_step: int, show: bool = True):
        self.name, self.steps, self.tokens_per_step = name, steps, tokens_per_step
        self.tokens_per_second: float | None = None
        self._mark: tuple[int, float] | None = None
        self._paused = 0.0
        self._printed = time.monotonic()
        self._show, self._live = show, show and sys.stderr.isatty()
        console = Console(stderr=True)
        columns = (
            rp.SpinnerColumn(spinner_name(console)),
            rp.TextColumn("{task.description}"),
            rp.BarColumn(),
            rp.MofNCompleteColumn(),
            rp.TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s"),
            rp.TimeRemainingColumn(),
        )
        self._bar = rp.Progress(*columns, console=console, disable=not self._live)
        self._task = self._bar.add_task(name, total=steps, completed=done, loss="...", speed="...")

    def __enter__(self) -> Progress:
        self._bar.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._bar.__exit__(*exception)

    def update(self, step: int, loss: float) -> None:
        """Report a step that has finished on the device, which is certain once its loss was read.

        Args:
          step: Number of finished steps.
          loss: Loss of the step, in nats per token.
        """
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
            left = "" if self.tokens_per_second is None else self._left(step, self.tokens_per_second)
            print(
                f"{self.name} step {step}/{self.steps}  loss {loss:.3f}  {speed} tokens/s{left}",
                file=sys.stderr,
                flush=True,
            )

    def shorten(self, steps: int) -> None:
        """Set the number of steps of the whole run to `steps`."""
        self.steps = steps
        self._bar.update(self._task, total=steps)

    def _left(self, step: int, tokens_per_second: float) -> str:
        seconds = (self.steps - step) * self.tokens_per_step / tokens_per_second
        return f"  {int(seconds // 60)}:{int(seconds % 60):02d} left"

    @contextlib.contextmanager
    def pause(self, why: str, line: bool = False) -> Iterator[None]:
        """Exclude the time inside the context from the speed.

        Args:
          why: Reason, which the bar shows behind the name.
          line: If stderr is no terminal, also print the reason as a line.
        """
        begun = time.monotonic()
        self._bar.update(self._task, description=f"{self.name} ({why})")
        if line and self._show and not self._live:
            print(f"{self.name}: {why}", file=sys.stderr, flush=True)
        try:
            yield
        finally:
            self._bar.update(self._task, description=self.name)
            self._paused += time.monotonic() - begun
