from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from bench_stage import BUFFER, ours_over, scattered

from mooncake_connector.bench.base import Route
from mooncake_connector.bench.conditions import Workload
from mooncake_connector.bench.pair import Pair

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("route", [Route.TCP, Route.SAME_HOST])
def test_our_engine_puts_every_byte_in_its_place(route: Route, tmp_path: Path) -> None:
    with Pair(ours_over(route), BUFFER, tmp_path) as pair:
        for threads in (1, 3):
            both = tuple(
                (scattered("read", 9, thread), scattered("write", 9, thread))
                for thread in range(threads)
            )
            pair.check(Workload(name="both ways", work=both))


def test_runs_are_counted_and_their_bytes_too(tmp_path: Path) -> None:
    read, write = scattered("read", 9), scattered("write", 5, thread=1)
    workload = Workload(name="a read and a write by turns", work=((read, write), (read, write)))
    with Pair(ours_over(Route.TCP), BUFFER, tmp_path) as pair:
        pair.prepare(workload, 0.0)
        reading = pair.measure(0.0, runs=3)
    assert len(reading.samples) == 2 * 3
    assert reading.nbytes == 2 * (2 * read.nbytes + write.nbytes)
    assert reading.wall_s >= max(reading.samples)
    assert reading.initiator_cpu_s > 0
    assert reading.target_cpu_s > 0
