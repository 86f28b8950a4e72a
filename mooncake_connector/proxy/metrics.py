"""What the proxy counts, in a registry of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from typing_extensions import override

from mooncake_connector.proxy.pool import JOBS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mooncake_connector.proxy.pool import Pool

#: From a warm cache hit to a queue that is about to run into its time-out.
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one proxy; `registry` is what `/metrics` shows."""

    def __init__(self, pool: Pool) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Servers(pool))
        self.requests = Counter(
            "mooncake_proxy_requests",
            "Completion requests by how they ended",
            ["outcome"],
            registry=self.registry,
        )
        self.bypassed = Counter(
            "mooncake_proxy_bypassed",
            "Requests that decode computed alone because remote KV does not fit them",
            ["reason"],
            registry=self.registry,
        )
        self.recomputed = Counter(
            "mooncake_proxy_recomputed",
            "Requests that decode computed alone because the prefill leg or its KV was lost",
            ["reason"],
            registry=self.registry,
        )
        self.first_byte = Histogram(
            "mooncake_proxy_first_byte_seconds",
            "From the client's request to the first byte of its answer",
            registry=self.registry,
            buckets=_SECONDS,
        )


class _Servers(Collector):
    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    @override
    def collect(self) -> Iterable[GaugeMetricFamily]:
        servers = GaugeMetricFamily(
            "mooncake_proxy_servers", "Known servers", labels=["job", "state"]
        )
        for job in JOBS:
            servers.add_metric([job, "in"], self._pool.count(job, up=True))
            servers.add_metric([job, "out"], self._pool.count(job, up=False))
        yield servers
        in_flight = GaugeMetricFamily(
            "mooncake_proxy_in_flight", "Requests of this proxy in a server", labels=["server"]
        )
        for url, server in sorted(self._pool.servers.items()):
            in_flight.add_metric([url], server.in_flight)
        yield in_flight
