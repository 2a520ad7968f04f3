"""Interleaved timing of variants on a noisy machine, and the machine's peak rates."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp


def interleave(arms: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Time variants in turn, so that a drift of the machine's speed affects all of them alike.

    Args:
      arms: Functions by name. Each does its work once and returns the seconds it took. Each was warmed up before.
      rounds: Number of measurements of each variant.

    Returns:
      Measured seconds by name, one value per round.
    """
    seconds = {name: [] for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            seconds[name].append(arm())
    return seconds


def timed(work: Callable[[], object]) -> float:
    """Return the seconds of one call, including the wait for its arrays."""
    start = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - start


def relative_iqr(values: list[float]) -> float:
    """Return half the interquartile range as a fraction of the median; 0 if all values are equal."""
    low, middle, high = min(values), statistics.median(values), max(values)
    if len(values) > 2:
        low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / 2 / middle if high > low else 0.0


def machine() -> dict[str, float]:
    """Measure peak float32 matmul rate (FLOP/s, 2048^3) and memory rate (bytes/s, 256 MiB scaled in place)."""
    a = jnp.ones((2048, 2048), jnp.float32)
    product, big = jax.jit(lambda a: a @ a), jnp.ones(2**26, jnp.float32)
    scale = jax.jit(lambda x: x * 1.5, donate_argnums=0)
    timed(lambda: product(a))
    big = scale(big)
    flops = max(2 * 2048**3 / timed(lambda: product(a)) for _ in range(5))
    rates = []
    for _ in range(5):
        start = time.perf_counter()
        big = jax.block_until_ready(scale(big))
        rates.append(2 * big.nbytes / (time.perf_counter() - start))
    return {"flops_per_second": flops, "bytes_per_second": max(rates)}
