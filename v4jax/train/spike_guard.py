"""Loss-spike guard: judges every step inside the compiled program, so that a bad one changes nothing but its count."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from v4jax import config

_LEAST = 1e-6  # losses and norms below count as this: their logarithm must exist
_FLOOR = 0.02  # least spread of a logarithm: in a run that stands still, two per cent are no outlier's scale
_SIGMA = 1.4826  # of a normal distribution, in median absolute deviations


class SpikeGuardState(NamedTuple):
    """What the guard remembers; part of the checkpoint.

    recent_2W: float32, logarithms of loss and gradient norm of the last W steps that were taken. taken: int32 scalar,
    steps taken. row: int32 scalar, steps skipped since the last one that was taken. skipped: int32 scalar, all skipped.
    """

    recent_2W: jax.Array
    num_steps: jax.Array
    consecutive_skips: jax.Array
    skipped: jax.Array


def new_guard(train: config.Train) -> SpikeGuardState | None:
    """The guard before the first step; None where `train.spike_action` is off."""
    if train.spike_action == "off":
        return None
    zero = jnp.zeros((), jnp.int32)
    return SpikeGuardState(jnp.zeros((2, train.spike_window), jnp.float32), zero, zero, zero)


def check_step(
    guard: SpikeGuardState, loss: jax.Array, grad_norm: jax.Array, factor: float
) -> tuple[jax.Array, SpikeGuardState]:
    """Whether to take a step with this loss and gradient norm (bool scalar), and the guard after it.

    A step is a spike if one of the two is no finite number or, once W steps were taken, if the logarithm of one lies
    more than `factor` spreads above the median of those of the last W. The spread is the median absolute deviation,
    as a normal distribution's sigma: spikes that were let through do not move either much. Factor 0: numbers of any
    size are good.
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
    """The tree `new` if the step is taken, else `old`, bit for bit."""
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
