"""Prometheus metrics of an engine.

    import v4jax.serve.metrics
    from prometheus_client import REGISTRY, start_http_server

    REGISTRY.register(v4jax.serve.metrics.EngineCollector(llm))
    start_http_server(9100)

Metric names start with `v4jax_`. Sizes are in bytes, times in seconds. Metrics of a tier have the label `tier`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from v4jax.serve.llm import LLM

_TIERS = ("host", "disk")
# Gauges and their help; a name of `LLM.stats` in neither table is a counter.
_GAUGES = {
    "waiting": "requests that wait to be admitted",
    "running": "requests that read a prompt or decode",
    "pages_free": "pages that hold nothing",
    "pages_cached": "pages that no request uses and prompts may find",
    "pages_in_use": "pages of running requests",
    "records_spare": "records that hold nothing",
    "records_kept": "records that prompts may find",
    "hit_rate": "blocks of prompts found on the device, of all asked for",
    "hit_ceiling": "blocks of prompts asked for before, of all asked for: no cache finds more",
    "kv_bytes": "all device arrays of the cache",
    "kv_host_bytes": "arrays of the cache that live in host memory",
    "hot_hit_rate": "top-k entries of decode steps that were found on the device, of all of entries in host memory",
    "queue_idle": "idle blocks that wait to be copied down",
    "queue_saves": "copies on their way down",
    "queue_writes": "items that wait to be written to disk",
}
_TIER_GAUGES = {
    "blocks": "blocks held",
    "records": "records held",
    "bytes": "bytes held",
    "budget": "bytes that may be held",
    "breaker_open": "1 while reads are not tried",
    "paused": "1 while writes are not tried",
    "read_ms_mean": "mean time of a read",
    "read_ms_max": "longest time of a read",
}
_MILLISECONDS = re.compile(r"_ms(_|$)")


class EngineCollector(Collector):
    """Exports `llm.stats()`, which it reads at every scrape; keeps a reference to the LLM."""

    def __init__(self, llm: LLM):
        self._stats: Callable[[], dict[str, float]] = llm.stats

    def describe(self) -> list[Metric]:
        """Return no metrics, because registering must not wait for a busy engine."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield one metric family per metric name."""
        families: dict[str, Metric] = {}
        for stat, value in self._stats().items():
            tier, _, rest = stat.partition("_")
            tiered = tier in _TIERS
            name, gauges, labels = (rest, _TIER_GAUGES, [tier]) if tiered else (stat, _GAUGES, [])
            unit = _MILLISECONDS.search(name)
            full = "v4jax_" + "tier_" * tiered + (_MILLISECONDS.sub(r"_seconds\1", name) if unit else name)
            if full not in families:
                kind = GaugeMetricFamily if name in gauges else CounterMetricFamily
                families[full] = kind(full, gauges.get(name, name.replace("_", " ")), labels=["tier"] * tiered)
            families[full].add_metric(labels, value / 1e3 if unit else value)
        yield from families.values()
