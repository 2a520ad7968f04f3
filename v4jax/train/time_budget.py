"""`train.max_seconds`: how many steps a run makes so that it ends in time, decided once, after its first steps.

The first steps are the same for any number of steps, because the learning rate warms up. After `MEASURED` of them
their time is known, and where the rest would take too long the run gets fewer steps, and with them a schedule that
ends at its last step. The number is written to v4jax.json, so a resumed run keeps it.
"""

from __future__ import annotations

import dataclasses
import os

from v4jax import config as configs
from v4jax.checkpoint.directory import read_config
from v4jax.checkpoint.orbax import finished_steps
from v4jax.config import Config

MEASURED = 10  # steps
# The end of a run, in steps of training and in compilations of a step. A batch of evaluation takes a fifth of a step,
# xz and the trigram model take eight steps, and evaluation compiles in a fifth of the time (`tiny`, an Intel Xeon).
_EVALUATION, _BASELINES, _COMPILATION = 0.25, 8, 0.25


def fit_steps(
    train: configs.Train,
    done: int,
    step_seconds: float,
    compile_seconds: float,
    elapsed: float,
    heldout_batches: int,
) -> int:
    """Steps of the whole run: `train.steps`, or as many as end within `train.max_seconds`, at least half of them.

    Args:
      train: Its `steps` are the wish.
      done: Steps made so far.
      step_seconds: Time of one step.
      compile_seconds: Time that the first step took to compile; another number of steps is another program.
      elapsed: Seconds since the run began.
      heldout_batches: Batches of the evaluation at the end.

    Returns:
      The number of steps; `train.steps` where it fits or max_seconds is 0.
    """
    end = step_seconds * (_EVALUATION * heldout_batches + _BASELINES) + compile_seconds * _COMPILATION
    left = train.max_seconds - elapsed - end
    if not train.max_seconds or done + left / step_seconds >= train.steps:
        return train.steps
    fitting = done + int((left - compile_seconds) / step_seconds)
    return max(fitting, -(-train.steps // 2), done)


def resumed(config: Config, workdir: str | os.PathLike) -> Config:
    """`config` with the number of steps that the run in `workdir` was given, if it was measured already."""
    if not config.train.max_seconds or not finished_steps(workdir):
        return config
    stored = read_config(workdir).train
    if stored.max_seconds != config.train.max_seconds:
        return config
    return with_steps(config, min(stored.steps, config.train.steps))


def with_steps(config: Config, steps: int) -> Config:
    """`config` with another number of steps."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))
