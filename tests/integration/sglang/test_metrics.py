"""What SGLang's /metrics says about our transfers, beside its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from harness.servers import get
from prometheus_client.parser import text_string_to_metric_families
from server_stage import until
from sglang_requests import both
from sglang_stage import PAGE_BYTES

from mooncake_connector.stats import Counts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from harness.servers import Server
    from prometheus_client.samples import Sample
    from sglang_stage import Stage

pytestmark = pytest.mark.integration

PREFIX = "mooncake_connector:"
#: Those that show zeros before anything happened.
NAMES = {"transfer_seconds", "transfer_bytes", "transfer_descriptors", "transfer_runs"}
NAMES |= {"exposed_seconds", "requests", "held_pages"}
ROW_BYTES = 4096  # a request's row of metadata is 1600 bytes here, whatever its length
COUNTED_S = 15.0  # a rank records once a second


def samples(server: Server, prefix: str = PREFIX) -> dict[str, list[Sample]]:
    """Metric -> its samples."""
    text = get(server.url, "/metrics", 30)[1]
    return {
        family.name.removeprefix(prefix): family.samples
        for family in text_string_to_metric_families(text)
        if family.name.startswith(prefix)
    }


def totals(found: Iterable[list[Sample]]) -> dict[str, float]:
    """Sample, and the path or reason that it names -> sum."""
    sums: dict[str, float] = {}
    for family in found:
        for sample in family:
            more = sample.labels.get("path") or sample.labels.get("reason") or ""
            name = f"{sample.name.removeprefix(PREFIX)} {more}".strip()
            sums[name] = sums.get(name, 0) + sample.value
    return sums


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_both_sides_show_ours_under_the_labels_of_sglangs_own(stage: Stage, side: str) -> None:
    server = getattr(stage, side)
    ours = samples(server)
    assert set(ours) >= NAMES
    (own,) = samples(server, "sglang:")["max_total_num_tokens"]
    assert own.labels["engine_type"] == side
    for name in ("requests", "held_pages"):
        assert [sample.labels for sample in ours[name]] == [own.labels], name


@pytest.mark.parametrize("path", ["shm", "tcp"])
def test_a_transfer_is_counted_once_and_in_the_right_units(
    stage: Stage, prompt: Callable[[int], list[int]], path: str
) -> None:
    before = totals(samples(stage.decode).values())
    ids = prompt(240)
    both(stage, ids, path=path, max_tokens=2)

    def gained() -> dict[str, float]:
        after = totals(samples(stage.decode).values())
        return {name: value - before.get(name, 0) for name, value in after.items()}

    until(lambda: gained()["requests_total"], COUNTED_S, "decode counted the request")
    now = gained()
    counted = {
        "requests_total": 1,
        f"path_batches_total {path}": 2,  # the KV, then the row of metadata
        "transfer_bytes_count": 2,
        "transfer_seconds_count": 2,
    }
    assert {name: now[name] for name in counted} == counted
    assert 4 * PAGE_BYTES < now["transfer_bytes_sum"] < 4 * PAGE_BYTES + ROW_BYTES
    assert not [name for name in now if name.startswith("failures") and now[name]]


def test_counts_are_dropped_when_metrics_are_off() -> None:
    """Nobody else would take them from the node, which keeps what nobody takes."""
    from sglang.srt.disaggregation.base.conn import KVArgs
    from sglang.srt.server_args import ServerArgs

    from mooncake_connector.sglang.metrics import observer

    off = ServerArgs(model_path="none")
    assert not off.enable_metrics
    assert observer(off, KVArgs())(Counts(requests=1)) is None
