"""Our Prometheus metrics: the same names, texts and buckets under every framework."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

PREFIX = "mooncake_connector:"

_TIMES = [10.0**exponent * step for exponent in range(-4, 2) for step in (1, 2, 5)]
_SIZES = [2.0**power for power in range(12, 36, 2)]
_NUMBERS = [4.0**power for power in range(11)]
#: Field of `stats.Counts` -> name, text, buckets.
HISTOGRAMS = {
    "seconds": (
        "transfer_seconds",
        "Seconds from submit to last byte, per batch of reads.",
        _TIMES,
    ),
    "nbytes": ("transfer_bytes", "Bytes per batch of reads.", _SIZES),
    "descriptors": (
        "transfer_descriptors",
        "Runs per batch before neighbours are merged.",
        _NUMBERS,
    ),
    "runs": ("transfer_runs", "Runs per batch after neighbours were merged.", _NUMBERS),
    "exposed": (
        "exposed_seconds",
        "Seconds per request from its last page computed to all of it taken by decode: the part "
        "of the transfer that prefill does not hide.",
        _TIMES,
    ),
}


class Instruments:
    """One process's metrics, made of the metric classes that its framework uses.

    Args:
        counter: `prometheus_client.Counter` or one that takes the same arguments.
        gauge: Ditto `Gauge`.
        histogram: Ditto `Histogram`.
        labelnames: Labels that every sample carries.
    """

    def __init__(
        self,
        counter: Callable[..., Any],
        gauge: Callable[..., Any],
        histogram: Callable[..., Any],
        labelnames: Sequence[str],
    ) -> None:
        labels = list(labelnames)
        self._histograms = {
            field: histogram(
                name=PREFIX + name, documentation=text, buckets=buckets, labelnames=labels
            )
            for field, (name, text, buckets) in HISTOGRAMS.items()
        }
        self._requests = counter(
            name=f"{PREFIX}requests",
            documentation="Requests whose KV was received whole and confirmed.",
            labelnames=labels,
        )
        self._paths = counter(
            name=f"{PREFIX}path_batches",
            documentation="Batches of reads by the transport that served them.",
            labelnames=[*labels, "path"],
        )
        self._failures = counter(
            name=f"{PREFIX}failures",
            documentation="Requests whose transfer failed, by reason.",
            labelnames=[*labels, "reason"],
        )
        self._held = gauge(
            name=f"{PREFIX}held_pages",
            documentation="Pages of finished prefills that wait for a decode server.",
            labelnames=labels,
        )

    def begin(self, labels: Sequence[object]) -> None:
        """Show zeros under these labels: Prometheus sees no increase in a number's first value."""
        self._held.labels(*labels).set(0)
        self._requests.labels(*labels)
        for histogram in self._histograms.values():
            histogram.labels(*labels)

    def observe(self, labels: Sequence[object], data: Mapping[str, Any]) -> None:
        """Record what was counted since the last call: the fields of `stats.Counts`."""
        for field, histogram in self._histograms.items():
            for value in data.get(field, ()):
                histogram.labels(*labels).observe(value)
        self._requests.labels(*labels).inc(data.get("requests", 0))
        for path, count in data.get("paths", {}).items():
            self._paths.labels(*labels, path).inc(count)
        for reason, count in data.get("failures", {}).items():
            self._failures.labels(*labels, reason).inc(count)
        if data.get("held_pages") is not None:
            self._held.labels(*labels).set(data["held_pages"])
