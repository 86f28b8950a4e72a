"""Metrics of several scheduler processes, merged as SGLang's HTTP server merges them."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

from metrics_child import CountingRank
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families

from mooncake_connector.stats import Counts

if TYPE_CHECKING:
    from pathlib import Path

PREFIX = "mooncake_connector:"
BATCH = Counts(seconds=[0.003], nbytes=[5000], descriptors=[8], runs=[2], paths={"tcp": 1})


def scraped(folder: Path) -> dict[tuple[str, ...], float]:
    """(name, rank, the label that this one metric has) -> value."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(folder))
    text = generate_latest(registry).decode()
    return {
        (
            sample.name.removeprefix(PREFIX),
            *(value for label, value in sorted(sample.labels.items(), reverse=True)),
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_ranks_in_processes_of_their_own_are_scraped_side_by_side(tmp_path: Path) -> None:
    with CountingRank(tmp_path, tp_rank=0) as first, CountingRank(tmp_path, tp_rank=1) as second:
        first.observe(BATCH)
        first.observe(Counts(requests=1, held_pages=3))
        second.observe(BATCH)
        second.observe(BATCH)
        second.observe(Counts(failures={"gone": 2}, held_pages=0))
        values = scraped(tmp_path)
    expected = {
        ("transfer_bytes_sum", "0"): 5000,
        ("transfer_bytes_sum", "1"): 10000,
        ("transfer_bytes_bucket", "1", "4096.0"): 0,
        ("transfer_bytes_bucket", "1", "16384.0"): 2,
        ("transfer_seconds_bucket", "0", "0.002"): 0,
        ("transfer_seconds_bucket", "0", "0.005"): 1,
        ("transfer_descriptors_sum", "0"): 8,
        ("transfer_runs_sum", "0"): 2,
        ("requests_total", "0"): 1,
        ("requests_total", "1"): 0,
        ("path_batches_total", "0", "tcp"): 1,
        ("path_batches_total", "1", "tcp"): 2,
        ("failures_total", "1", "gone"): 2,
        ("held_pages", "0"): 3,
        ("held_pages", "1"): 0,
    }
    assert {key: values.get(key) for key in expected} == expected


def test_a_rank_shows_zeros_before_anything_happened(tmp_path: Path) -> None:
    with CountingRank(tmp_path, tp_rank=0):
        values = scraped(tmp_path)
    shown = {key[0] for key in values}
    assert shown >= {"requests_total", "held_pages", "transfer_seconds_count", "transfer_bytes_sum"}
    assert set(values.values()) == {0}


def test_pages_held_by_a_dead_rank_are_not_counted_with_its_successors(tmp_path: Path) -> None:
    """A folder that the user named keeps the files of the server that died."""
    with CountingRank(tmp_path, tp_rank=0) as rank:
        rank.observe(Counts(requests=2, held_pages=7))
    assert scraped(tmp_path)["held_pages", "0"] == 7
    with CountingRank(tmp_path, tp_rank=0) as rank:
        assert scraped(tmp_path)["held_pages", "0"] == 0
        rank.observe(Counts(requests=1, held_pages=2))
        values = scraped(tmp_path)
    assert values["held_pages", "0"] == 2
    assert values["requests_total", "0"] == 3  # counters only rise


def test_registering_the_plugin_leaves_prometheus_unimported() -> None:
    """The launcher registers plugins before it names the folder; an import by then ignores it."""
    code = (
        "import sys\n"
        "from mooncake_connector.sglang import metrics, register\n"
        "sys.exit('prometheus_client' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
