"""Loss-spike guard: decides inside the jitted step whether to apply the update; a skip changes only counters."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from v4jax import config

_LEAST = 1e-6  # losses and gradient norms are clamped to at least this value, so that their logarithm exists
_FLOOR = 0.02  # minimum spread of the logarithms: in a run at a plateau, a change of 2% is no outlier
_SIGMA = 1.4826  # standard deviation of a normal distribution divided by its median absolute deviation


# Names of the fields of SpikeGuardState in checkpoints: a file format, so they stay when a field is renamed.
CHECKPOINT_NAMES = ("recent_2W", "taken", "row", "skipped")


class SpikeGuardState(NamedTuple):
    """State of the guard; part of the checkpoint.

    Attributes:
      recent_2W: float32 [2, W], logarithms of the loss and of the gradient norm of the last W applied steps, as a ring.
      num_steps: int32 scalar, number of applied steps.
      consecutive_skips: int32 scalar, number of steps skipped since the last applied step.
      skipped: int32 scalar, number of all skipped steps.
    """

    recent_2W: jax.Array
    num_steps: jax.Array
    consecutive_skips: jax.Array
    skipped: jax.Array


def new_guard(train: config.Train) -> SpikeGuardState | None:
    """Return the guard's state before the first step, or None if `train.spike_action` is "off"."""
    if train.spike_action == "off":
        return None
    zero = jnp.zeros((), jnp.int32)
    return SpikeGuardState(jnp.zeros((2, train.spike_window), jnp.float32), zero, zero, zero)


def check_step(
    guard: SpikeGuardState, loss: jax.Array, grad_norm: jax.Array, factor: float
) -> tuple[jax.Array, SpikeGuardState]:
    """Decide whether to apply a step.

    A step is a spike if its loss or gradient norm is not finite. Once W steps were applied, it is also a spike if the
    logarithm of either exceeds the median of the last W applied steps by more than `factor` times their spread. The
    spread is the median absolute deviation, scaled to the standard deviation of a normal distribution. Neither the
    median nor this spread moves much if a spike was applied.

    Args:
      guard: The guard's state before the step.
      loss: float scalar, nats per token.
      grad_norm: float scalar, global norm of the gradients before clipping.
      factor: Limit in spreads; 0 checks only for values that are not finite.

    Returns:
      Whether to apply the step (bool scalar), and the guard's state after it.
    """
    now_2 = jnp.log(jnp.maximum(jnp.stack([loss, grad_norm]).astype(jnp.float32), _LEAST))
    good = jnp.all(jnp.isfinite(now_2))
    window = guard.recent_2W.shape[1]
    if factor > 0:
        median_2 = jnp.median(guard.recent_2W, axis=1)
        spread_2 = _SIGMA * jnp.median(jnp.abs(guard.recent_2W - median_2[:, None]), axis=1)
        high = jnp.any(now_2 > median_2 + factor * jnp.maximum(spread_2, _FLOOR))
        good &= (guard.num_steps < window) | ~high
    recent_2W = jnp.where(good, guard.recent_2W.at[:, guard.num_steps % window].set(now_2), guard.recent_2W)
    step = good.astype(jnp.int32)
    return good, SpikeGuardState(
        recent_2W, guard.num_steps + step, (guard.consecutive_skips + 1) * (1 - step), guard.skipped + 1 - step
    )


def select_state(good: jax.Array, new, old):
    """Select a state tree without changing a bit of it.

    Args:
      good: bool scalar, the decision of `check_step`.
      new: Pytree of arrays after the update.
      old: Pytree of the same structure before the update.

    Returns:
      `new` if `good`, else `old`.
    """
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
