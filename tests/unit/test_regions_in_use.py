"""Regions that a peer's slice touches while their owner takes them back."""

from __future__ import annotations

import threading

import pytest
from mooncake_engine.errors import OutOfBounds
from mooncake_engine.memory import RegionTable
from mooncake_engine.types import Region, uint64s


def test_removing_a_region_interrupts_its_users_and_waits_until_they_left() -> None:
    regions = RegionTable()
    regions.add(Region(1000, 100, "cpu"))
    interrupted, left = threading.Event(), threading.Event()
    seen_gone: list[bool] = []

    def remove() -> None:
        regions.remove(1000)
        seen_gone.append(left.is_set())

    remover = threading.Thread(target=remove)
    with regions.serving(uint64s([1090]), uint64s([10]), interrupted.set):
        remover.start()
        assert interrupted.wait(10)
        remover.join(0.1)  # would end at once if it did not wait
        left.set()
    remover.join(10)
    assert seen_gone == [True]


def test_removing_a_region_leaves_the_users_of_others_alone() -> None:
    regions = RegionTable()
    for address in (1000, 1100):
        regions.add(Region(address, 100, "cpu"))
    interrupted = threading.Event()
    with regions.serving(uint64s([1100]), uint64s([100]), interrupted.set):
        regions.remove(1000)
    assert not interrupted.is_set()


def test_a_removed_region_is_served_no_more() -> None:
    regions = RegionTable()
    regions.add(Region(1000, 100, "cpu"))
    regions.remove(1000)
    with (
        pytest.raises(OutOfBounds, match="no registered memory"),
        regions.serving(uint64s([1000]), uint64s([1]), lambda: None),
    ):
        pass
