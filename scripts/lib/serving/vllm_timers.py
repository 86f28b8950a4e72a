"""What each connector of vLLM counts by itself, brought to the same four names.

"requests" or "batches", "bytes" and "seconds": ours and NIXL's from decode's `/metrics`, Mooncake's
from the line that prefill, which writes, logs every ten seconds. Of ours, prefill counts one more.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from harness.servers import get
from harness.transfers import Transfers
from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

NIXL = {
    "vllm:nixl_xfer_time_seconds_count": "batches",
    "vllm:nixl_xfer_time_seconds_sum": "seconds",
    "vllm:nixl_bytes_transferred_sum": "bytes",
    "vllm:nixl_num_failed_transfers_total": "failed",
}
# "... KV Transfer metrics: Num successful transfers=3, Avg xfer time (ms)=81.2, ..."
LINE = re.compile(
    r"Num successful transfers=(?P<count>\d+), Avg xfer time \(ms\)=(?P<ms>[\d.]+)"
    r".*?Avg MB per transfer=(?P<mib>[\d.]+)"
)


def ours(prefill: Iterable[str], decode: Iterable[str]) -> dict[str, float]:
    """Totals of servers of ours since they started."""
    looks = [Transfers.of(url) for url in decode]
    return {
        "requests": sum(look.requests for look in looks),
        "bytes": sum(look.nbytes for look in looks),
        "seconds": sum(look.seconds for look in looks),
        "exposed_seconds": sum(Transfers.of(url).exposed for url in prefill),
    }


def nixl(url: str) -> dict[str, float]:
    """Totals of a decode server with NIXL since it started."""
    return nixl_totals(get(url, "/metrics", timeout_s=30)[1])


def nixl_totals(text: str) -> dict[str, float]:
    """Ditto, of what `/metrics` said."""
    totals = dict.fromkeys(NIXL.values(), 0.0)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in NIXL:
                totals[NIXL[sample.name]] += sample.value
    return totals


def mooncake(log: Path) -> dict[str, float]:
    """Totals of a prefill server with Mooncake's connector; up to ten seconds old."""
    return mooncake_totals(log.read_text(errors="replace"))


def mooncake_totals(text: str) -> dict[str, float]:
    """Ditto, of its log. The line says means, so a total is the mean times the number."""
    totals = {"batches": 0.0, "seconds": 0.0, "bytes": 0.0}
    for line in LINE.finditer(text):
        count = int(line["count"])
        totals["batches"] += count
        totals["seconds"] += count * float(line["ms"]) / 1e3
        totals["bytes"] += count * float(line["mib"]) * 2**20
    return totals
