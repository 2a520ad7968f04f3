"""Records of measurements."""

from __future__ import annotations

import statistics

import jax

from v4jax.tools.bench.measure import spread


def record(suite: str, metric: str, values: list[float], unit: str, **coordinates) -> dict:
    """One flat record: the median of `values` with its spread, and where and how it was taken."""
    return {
        "suite": suite, "metric": metric, "value": statistics.median(values), "unit": unit, **coordinates,
        "device": jax.devices()[0].device_kind, "rounds": len(values), "spread": spread(values),
    }  # fmt: skip
