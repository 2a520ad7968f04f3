"""Time budget of a run (`train.max_seconds`): the number of steps is decided once, after the first steps.

The first steps do not depend on the number of steps, because the learning rate warms up. After `MEASURED` steps the
time of a step is known. If the remaining steps would take too long, the run gets fewer steps, and the learning-rate
schedule ends at the new last step. Every later checkpoint stores the decision, so a resumed run keeps it. A run that is
resumed with another `train.steps` or `train.max_seconds`, or was stopped before the decision, measures again.
"""

from __future__ import annotations

import dataclasses
import os

from v4jax import config as configs
from v4jax.checkpoint.orbax import newest_extras
from v4jax.config import Config

MEASURED = 10  # number of steps after which the run decides
# Time of the work after the last step. A batch of evaluation takes _EVALUATION of a training step,
# xz and the trigram model together take _BASELINES steps, and evaluation compiles in _COMPILATION of the time in which
# a training step compiles. All three are generous, so that a run ends in time.
_EVALUATION, _BASELINES, _COMPILATION = 0.25, 8, 0.25


def fit_steps(
    train: configs.Train,
    done: int,
    step_seconds: float,
    compile_seconds: float,
    elapsed: float,
    heldout_batches: int,
) -> int:
    """Choose the number of steps of the whole run so that it ends within `train.max_seconds`.

    The run never gets less than half of `train.steps`, even if it then takes longer than `train.max_seconds`.

    Args:
      train: Training config; `steps` is the requested number of steps.
      done: Steps made so far.
      step_seconds: Seconds of one step.
      compile_seconds: Seconds that the first step took to compile. Another number of steps is compiled again, because
        it is another program.
      elapsed: Seconds since the run began.
      heldout_batches: Batches of the evaluation at the end.

    Returns:
      The number of steps; `train.steps` if it fits or if max_seconds is 0.
    """
    end = step_seconds * (_EVALUATION * heldout_batches + _BASELINES) + compile_seconds * _COMPILATION
    left = train.max_seconds - elapsed - end
    if not train.max_seconds or done + left / step_seconds >= train.steps:
        return train.steps
    fitting = done + int((left - compile_seconds) / step_seconds)
    return max(fitting, -(-train.steps // 2), done)


def record(train: configs.Train, steps: int) -> dict[str, float]:
    """Return the decision that checkpoints store: a run configured as `train` got `steps` steps."""
    return {"requested_steps": train.steps, "max_seconds": train.max_seconds, "steps": steps}


def restore(config: Config, workdir: str | os.PathLike) -> tuple[Config, dict[str, float] | None]:
    """Apply the decision that the newest checkpoint of the run in `workdir` stores.

    Returns:
      `config` with the stored number of steps, and the stored `record`. If there is no decision, or it was made for
      another number of steps or another budget: `config` unchanged, and None.
    """
    if not config.train.max_seconds:
        return config, None
    stored = (newest_extras(workdir) or {}).get("time_budget")
    if stored is None or stored != record(config.train, stored["steps"]):
        return config, None
    return with_steps(config, stored["steps"]), stored


def with_steps(config: Config, steps: int) -> Config:
    """Return `config` with `train.steps` set to `steps`."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))
