"""Counts of the nodes -> vLLM's log line and /metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from mooncake_connector.metrics import HISTOGRAMS, Instruments

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import PromMetric, PromMetricT

    from mooncake_connector.stats import Counts


@dataclass
class MooncakeStats(KVConnectorStats):
    """`stats.Counts` as vLLM carries it: `data` has the same keys, plain values."""

    @classmethod
    def of(cls, counts: Counts) -> MooncakeStats:
        """One rank's counts."""
        return cls(msgspec.to_builtins(counts))

    def reset(self) -> None:
        """Forget everything."""
        self.data: dict[str, Any] = {}

    def is_empty(self) -> bool:
        """True when nothing was counted."""
        return not self.data

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Add another rank's, or a later step's, counts to these."""
        if not self.data:
            self.data = other.data
            return self
        for key in HISTOGRAMS:
            self.data[key].extend(other.data.get(key, ()))
        for key in ("paths", "failures"):
            for name, count in other.data.get(key, {}).items():
                self.data[key][name] = self.data[key].get(name, 0) + count
        self.data["requests"] += other.data.get("requests", 0)
        if other.data.get("held_pages") is not None:
            self.data["held_pages"] = other.data["held_pages"]
        return self

    def reduce(self) -> dict[str, int | float]:
        """One log line's worth."""
        seconds, nbytes = self.data["seconds"], self.data["nbytes"]
        line: dict[str, Any] = {
            "requests": self.data["requests"],
            "batches": len(seconds),
            "failed": sum(self.data["failures"].values()),
            "held pages": self.data["held_pages"],
        }
        if seconds:
            line["MB"] = round(sum(nbytes) / 1e6, 3)
            line["p50 ms"] = round(float(np.median(seconds)) * 1e3, 3)
            line["GB/s"] = round(sum(nbytes) / max(sum(seconds), 1e-9) / 1e9, 3)
            line["runs/descriptors"] = f"{sum(self.data['runs'])}/{sum(self.data['descriptors'])}"
            line["path"] = "+".join(sorted(self.data["paths"]))
        for reason, count in self.data["failures"].items():
            line[f"failed ({reason})"] = count
        return line


class MooncakePromMetrics(KVConnectorPromMetrics):
    """`mooncake_connector:*` on vLLM's /metrics."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], type[PromMetricT]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._instruments = Instruments(
            self._counter_cls, self._gauge_cls, self._histogram_cls, labelnames
        )
        for values in per_engine_labelvalues.values():
            self._instruments.begin(values)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Record one interval's `MooncakeStats.data`."""
        self._instruments.observe(self.per_engine_labelvalues[engine_idx], transfer_stats_data)
