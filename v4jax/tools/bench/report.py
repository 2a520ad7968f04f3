"""Records of measurements, and helpers for plots."""

from __future__ import annotations

import os
import statistics

import jax

from v4jax.tools.bench.measure import relative_iqr


def record(suite: str, metric: str, values: list[float], unit: str, **coordinates) -> dict:
    """Return one flat record: the median of `values`, its spread, the coordinates, the device and the rounds."""
    return {
        "suite": suite,
        "metric": metric,
        "value": statistics.median(values),
        "unit": unit,
        **coordinates,
        "device": jax.devices()[0].device_kind,
        "rounds": len(values),
        "spread": relative_iqr(values),
    }


def write(figure, path: str) -> None:
    """Write a matplotlib Figure to a PNG file atomically."""
    partial = f"{path}.partial"
    figure.savefig(partial, dpi=120, format="png")
    os.replace(partial, path)


def short(tokens: int) -> str:
    """Format a number of tokens with a binary unit: 1048576 as 1M, 4096 as 4k."""
    for letter, size in (("M", 2**20), ("k", 2**10)):
        if tokens % size == 0:
            return f"{tokens // size}{letter}"
    return str(tokens)
