"""Every count of the engine reaches Prometheus under a name of its own, with the right type and unit."""

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families as parse

from tests.serve.engine_harness import reset_cache, tokens_of
from tests.serve.offload_harness import tiered
from v4jax.serve import SamplingParams, metrics
from v4jax.serve.metrics import EngineCollector

pytestmark = pytest.mark.slow


class Llm:
    """As much of one as is asked for its counts."""

    def __init__(self, engine):
        self.stats = engine.stats


def scrape(engine) -> dict[tuple[str, str], tuple[str, float]]:
    """(name, tier) -> (type, value), as a Prometheus server would read them."""
    registry = CollectorRegistry()
    registry.register(EngineCollector(Llm(engine)))
    families = parse(generate_latest(registry).decode())
    return {(s.name, s.labels.get("tier", "")): (f.type, s.value) for f in families for s in f.samples}


def test_counts_are_those_of_stats(plain):
    reset_cache(plain)
    tokens_of(plain, [[5, 6, 7]], SamplingParams(max_tokens=4, temperature=0.0))
    read, stats = scrape(plain), plain.stats()
    assert len(read) == len(stats)
    assert read["v4jax_kv_device_used_bytes", ""] == ("gauge", stats["kv_device_used_bytes"])
    assert read["v4jax_num_blocks_free", ""] == ("gauge", stats["num_blocks_free"])
    assert read["v4jax_num_preemptions_total", ""] == ("counter", stats["num_preemptions"])


def test_tiers_are_labels(model, tmp_path):
    with tiered(model, tmp_path, host=1 << 20) as engine:
        stats = engine.stats()
        engine.stats = lambda: stats | {"disk_read_ms_mean": 250.0, "disk_corrupt": 3}
        read = scrape(engine)
    assert len(read) == len(stats)
    assert {tier for _, tier in read} == {"", "host", "disk"}
    assert read["v4jax_tier_read_seconds_mean", "disk"] == ("gauge", 0.25)
    assert read["v4jax_tier_corrupt_total", "disk"] == ("counter", 3)
    assert read["v4jax_tier_budget", "host"] == ("gauge", stats["host_budget"])
    described = {*metrics._GAUGES, *(f"{tier}_{name}" for tier in metrics._TIERS for name in metrics._TIER_GAUGES)}
    only_disk = {f"host_{name}" for name in ("breaker_open", "paused", "read_ms_mean", "read_ms_max")}
    assert described - only_disk - {"device_entry_cache_hit_rate"} <= set(stats), (
        "a gauge that the engine no longer has"
    )


@pytest.mark.parametrize("count", [0, 2])
def test_a_scrape_sees_what_happened_since(plain, count):
    reset_cache(plain)
    before = scrape(plain)["v4jax_prefix_cache_queries_total", ""][1]
    prompt = np.random.default_rng(3).integers(3, 60, 300).tolist()
    tokens_of(plain, [prompt] * count, SamplingParams(max_tokens=2, temperature=0.0))
    assert (scrape(plain)["v4jax_prefix_cache_queries_total", ""][1] > before) == (count > 0)
