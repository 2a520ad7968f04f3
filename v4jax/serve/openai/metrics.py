"""Prometheus metrics of the server, beside those of the engine (`serve.metrics.EngineCollector`).

Names are vLLM's with the prefix `v4jax_` where vLLM has the metric.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from v4jax.serve.metrics import EngineCollector
from v4jax.serve.openai.monitor import EngineMonitor

_FIRST_TOKEN_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 640)
_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5, 10)
_REQUEST_BUCKETS = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 5, 10, 20, 30, 60, 120, 240, 480, 960, 1920)


class ServerMetrics:
    """The metrics of one server, in a registry of its own.

    Attributes:
        http_requests: HTTP requests by path and status.
        finished: engine requests that ended by themselves, by finish reason.
        rejected: HTTP requests that were not admitted, by reason.
        cancelled: HTTP requests that ended before their reply was complete, by reason.
        first_token, inter_token, end_to_end: times of engine requests in seconds.
    """

    def __init__(self, monitor: EngineMonitor):
        self._registry = CollectorRegistry()
        self._registry.register(EngineCollector(monitor))
        self.http_requests = self._counter("http_requests", "HTTP requests", "path", "status")
        self.finished = self._counter("request_success", "requests that ended by themselves", "finished_reason")
        self.rejected = self._counter("requests_rejected", "HTTP requests that were not admitted", "reason")
        self.cancelled = self._counter("requests_cancelled", "HTTP requests that were cut off", "reason")
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "from submission to the first token", _FIRST_TOKEN_BUCKETS
        )
        self.inter_token = self._histogram("inter_token_latency_seconds", "between two outputs", _TOKEN_BUCKETS)
        self.end_to_end = self._histogram("e2e_request_latency_seconds", "from submission to the end", _REQUEST_BUCKETS)

    def text(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        return generate_latest(self._registry)

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(f"v4jax_{name}", help, labels, registry=self._registry)

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"v4jax_{name}", help, registry=self._registry, buckets=buckets)
