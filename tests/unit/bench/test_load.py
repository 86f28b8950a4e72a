from __future__ import annotations

import os

import pytest
from etcd_stage import wait_until

from mooncake_connector.bench.busy import BusyPython, busy_loops
from mooncake_connector.bench.load import (
    OTHER_LOAD_LIMIT,
    Sample,
    is_valid,
    machine_seconds,
    other_load,
    sample,
    tree_seconds,
)

TICK = 1 / os.sysconf("SC_CLK_TCK")
SOON = 30.0


def stat(pid: int, parent: int, *ticks: int, name: str = "any") -> str:
    """A line of /proc/<pid>/stat up to the times of ended children."""
    spent = " ".join(map(str, ticks))
    return f"{pid} ({name}) S {parent} {pid} {pid} 0 -1 4194560 1 0 0 0 {spent} 20 0 1 0\n"


@pytest.mark.parametrize(
    ("after", "cores"),
    [
        (Sample(at=12.0, busy=3.0, stolen=0.0, ours=3.0), 0.0),
        (Sample(at=12.0, busy=3.4, stolen=0.0, ours=3.0), 0.2),
        (Sample(at=12.0, busy=2.9, stolen=0.0, ours=3.0), 0.0),  # ticks are coarse
        (Sample(at=12.0, busy=3.0, stolen=1.0, ours=3.0), 0.5),  # stolen from us, counted as ours
    ],
)
def test_other_load_is_what_neither_we_nor_idling_took(after: Sample, cores: float) -> None:
    assert other_load(Sample(10.0, 0.0, 0.0, 0.0), after) == pytest.approx(cores)


def test_a_turn_is_valid_up_to_the_limit() -> None:
    assert is_valid(OTHER_LOAD_LIMIT)
    assert not is_valid(OTHER_LOAD_LIMIT + 0.01)


def test_guests_are_counted_once_and_stolen_time_is_busy() -> None:
    text = "cpu  10 20 30 400 50 6 7 8 9 9\ncpu0 1 1 1 1 1 1 1 1 1 1\n"
    assert machine_seconds(text) == pytest.approx((81 * TICK, 8 * TICK))


def test_the_tree_is_all_below_a_process_with_its_ended_children() -> None:
    stats = [
        stat(1, 0, 500, 500, 500, 500),
        stat(7, 1, 1, 2, 3, 4),
        stat(8, 7, 10, 20, 0, 0, name="a) S 1 (b"),
        stat(9, 8, 100, 0, 0, 0),
        stat(10, 1, 1000, 0, 0, 0),
        stat(11, 2, 0, 5000, 0, 0, name="ksoftirqd/0"),
    ]
    assert tree_seconds(stats, 7) == pytest.approx(5140 * TICK)


def test_busy_loops_are_ours_while_they_run_and_afterwards() -> None:
    before = sample().ours
    with busy_loops(2):
        wait_until(lambda: sample().ours > before + 0.1, SOON, "the loops' time is seen")
        running = sample()
        assert running.busy > 0
    assert sample().ours >= running.ours


def test_the_busy_threads_own_time_is_known() -> None:
    with BusyPython() as busy:
        wait_until(lambda: busy.cpu_s() > 0.05, SOON, "it runs")
        spent = busy.cpu_s()
    assert busy.close() >= spent
