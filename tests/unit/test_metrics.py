"""The metrics that both frameworks show."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import msgspec
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from mooncake_connector.metrics import PREFIX, Instruments
from mooncake_connector.stats import Counts

ROOT = Path(__file__).parents[2]
LABELS = {"model_name": "m", "engine": "0"}


class Shown:
    """Instruments in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.instruments = Instruments(
            *(
                functools.partial(kind, registry=self.registry)
                for kind in (Counter, Gauge, Histogram)
            ),
            list(LABELS),
        )

    def value(self, name: str, **more: str) -> float | None:
        return self.registry.get_sample_value(PREFIX + name, {**LABELS, **more})

    def observe(self, counts: Counts) -> None:
        self.instruments.observe(list(LABELS.values()), msgspec.to_builtins(counts))


@pytest.fixture
def shown() -> Shown:
    return Shown()


def test_counts_are_added_under_their_names(shown: Shown) -> None:
    counts = Counts(
        seconds=[0.25, 0.5],
        nbytes=[4096, 8192],
        descriptors=[16, 16],
        runs=[1, 3],
        exposed=[0.125],
        paths={"tcp": 1, "shm": 1},
        requests=2,
        failures={"expired": 1},
        held_pages=5,
    )
    shown.observe(counts)
    shown.observe(counts)
    assert shown.value("transfer_seconds_sum") == 1.5
    assert shown.value("transfer_seconds_bucket", le="0.2") == 0
    assert shown.value("transfer_seconds_bucket", le="0.5") == 4
    assert shown.value("transfer_bytes_sum") == 2 * 12288
    assert shown.value("transfer_bytes_count") == 4
    assert shown.value("transfer_descriptors_sum") == 64
    assert shown.value("transfer_runs_sum") == 8
    assert shown.value("exposed_seconds_sum") == 0.25
    assert shown.value("requests_total") == 4
    assert shown.value("path_batches_total", path="shm") == 2
    assert shown.value("failures_total", reason="expired") == 2
    assert shown.value("held_pages") == 5


def test_held_pages_stay_as_they_were_while_nothing_says_otherwise(shown: Shown) -> None:
    shown.observe(Counts(held_pages=5))
    shown.observe(Counts(requests=1))
    assert shown.value("held_pages") == 5
    shown.observe(Counts(held_pages=0))
    assert shown.value("held_pages") == 0


def test_zeros_are_shown_before_anything_happened(shown: Shown) -> None:
    assert shown.value("requests_total") is None
    shown.instruments.begin(list(LABELS.values()))
    for name in ("requests_total", "held_pages", "transfer_bytes_sum", "transfer_seconds_count"):
        assert shown.value(name) == 0, name


def test_the_page_on_metrics_names_each_with_its_kind_and_text(shown: Shown) -> None:
    families = text_string_to_metric_families(generate_latest(shown.registry).decode())
    offered = {
        (
            family.name.removeprefix(PREFIX) + "_total" * (family.type == "counter"),
            family.type,
            family.documentation,
        )
        for family in families
        if not family.name.endswith("_created")
    }
    page = (ROOT / "docs" / "metrics.md").read_text()
    rows = re.findall(rf"^\| `{PREFIX}(\w+)` \| (\w+) \|[^|]*\| ([^|]+) \|$", page, re.MULTILINE)
    assert set(rows) == offered
