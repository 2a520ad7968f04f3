"""Prometheus metrics of an engine.

    import v4jax.serve.metrics
    from prometheus_client import REGISTRY, start_http_server

    REGISTRY.register(v4jax.serve.metrics.EngineCollector(llm))
    start_http_server(9100)

Metric names are `v4jax_` and the names of `LLM.stats`, which are vLLM's where it has one. Sizes are in bytes, times in
seconds. Metrics of a tier have the label `tier`.
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
    "num_requests_waiting": "requests that wait to be admitted",
    "num_requests_running": "requests that prefill or decode",
    "kv_cache_usage_perc": "blocks of running requests, as a fraction of all blocks",
    "num_blocks_free": "blocks that hold nothing",
    "num_blocks_cached": "blocks that no request uses and prompts may find",
    "num_blocks_in_use": "blocks of running requests",
    "num_snapshots_free": "slots of state snapshots that hold nothing",
    "num_snapshots_cached": "state snapshots that prompts may find",
    "prefix_cache_hit_rate": "prompt tokens found in the prefix cache of the device, of all looked up",
    "prefix_cache_hit_ceiling": "prompt tokens looked up before, of all looked up: the hit rate of an unlimited cache",
    "kv_device_used_bytes": "arrays of the KV cache on the devices",
    "kv_host_used_bytes": "arrays of the KV cache in host memory",
    "device_entry_cache_hit_rate": "top-k entries of decode steps found on the device, of all kept in host memory",
    "queue_idle": "idle blocks that wait to be copied down",
    "queue_saves": "copies on their way down",
    "queue_writes": "items that wait to be written to disk",
}
_TIER_GAUGES = {
    "blocks": "blocks held",
    "snapshots": "state snapshots held",
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
