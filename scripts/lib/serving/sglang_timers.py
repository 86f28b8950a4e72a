"""What SGLang's servers say about their transfers on `/metrics`.

Two views. Our connector's: reads, from submit to last byte, counted by decode. SGLang's, on prefill
and for every backend: from the first page named to the last taken away (`kv_transfer_latency_ms`),
and of that what is left when the last chunk has been computed (a request's stage
`prefill_transfer_kv_cache`), which is what it waits for. Both are right for one request at a time:
prefill looks whether pages were taken away between two forward passes, so another prompt's counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.servers import get
from harness.transfers import PREFIX
from prometheus_client.parser import text_string_to_metric_families

from serving.setup import settled

if TYPE_CHECKING:
    from serving.setup import Timers

OF_DECODE = {
    f"{PREFIX}transfer_seconds_sum": ("seconds", 1.0),
    f"{PREFIX}transfer_bytes_sum": ("bytes", 1.0),
    f"{PREFIX}transfer_seconds_count": ("batches", 1.0),
    f"{PREFIX}transfer_descriptors_sum": ("descriptors", 1.0),
    f"{PREFIX}transfer_runs_sum": ("runs", 1.0),
}
OF_PREFILL = {
    "sglang:kv_transfer_latency_ms_sum": ("sglang_seconds", 1e-3),
    "sglang:kv_transfer_total_mb_sum": ("sglang_bytes", 2.0**20),
    "sglang:kv_transfer_latency_ms_count": ("sglang_requests", 1.0),
    "sglang:per_stage_req_latency_seconds_sum": ("exposed_seconds", 1.0),
    "sglang:per_stage_req_latency_seconds_count": ("exposed_requests", 1.0),
}
EXPOSED_STAGE = "prefill_transfer_kv_cache"


def timing(prefill: str, decode: str, *, ours: bool) -> Timers:
    """Totals of one pair since its start, when they have settled; takes a second or two.

    "seconds", "bytes" and "batches" are the connector's own, or SGLang's where it has none.

    Raises:
        OSError: A server does not answer.
    """

    def look() -> dict[str, float]:
        found = totals(get(prefill, "/metrics", timeout_s=30)[1], OF_PREFILL)
        if ours:
            return found | totals(get(decode, "/metrics", timeout_s=30)[1], OF_DECODE)
        own = {"seconds": "sglang_seconds", "bytes": "sglang_bytes", "batches": "sglang_requests"}
        return found | {name: found[of] for name, of in own.items()}

    return lambda: settled(look)


def totals(page: str, wanted: dict[str, tuple[str, float]]) -> dict[str, float]:
    """The wanted sums of one `/metrics` page by our names, 0 where the page has none."""
    found = {name: 0.0 for name, _ in wanted.values()}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.labels.get("stage", EXPOSED_STAGE) != EXPOSED_STAGE:
                continue
            if sample.name in wanted:
                name, factor = wanted[sample.name]
                found[name] += sample.value * factor
    return found
