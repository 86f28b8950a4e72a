"""The guest itself: what the tests of several rails rest on."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import numpy as np
import pytest
import rails
from harness.verbs_sides import Side, binding
from mooncake_engine.transport.rdma.verbs.base import Opcode

if TYPE_CHECKING:
    from mooncake_engine.transport.rdma.verbs.base import Verbs

SUCCESS, RETRIES_EXCEEDED = 0, 12
NBYTES = 1 << 16
WIRE = 0.9  # of the bytes; the rest is room for what a counter may miss, headers come on top


@pytest.fixture(scope="module")
def verbs() -> Verbs:
    return binding()


def write_over(verbs: Verbs, rail: rails.Rail) -> int:
    """Write from the rail's first device to its second; the status, and the bytes were checked."""
    with Side(verbs, rail.devices[0], psn=3) as ours, Side(verbs, rail.devices[1], psn=5) as theirs:
        ours.connect(theirs)
        theirs.connect(ours)
        ours.data[:NBYTES] = np.arange(NBYTES) % 251
        assert ours.post(Opcode.WRITE, theirs, [(0, [(0, NBYTES)])]) == 1
        (end,) = ours.completions(1)
        arrived = bool((theirs.data[:NBYTES] == ours.data[:NBYTES]).all())
        assert arrived == (end["status"] == SUCCESS)
        return int(end["status"])


def test_each_rail_carries_its_own_traffic(
    both_rails: tuple[rails.Rail, rails.Rail], verbs: Verbs
) -> None:
    for rail, other in (both_rails, both_rails[::-1]):
        before = [rails.bytes_sent(device) for device in (*rail.devices, *other.devices)]
        assert write_over(verbs, rail) == SUCCESS
        after = [rails.bytes_sent(device) for device in (*rail.devices, *other.devices)]
        sent = [now - then for now, then in zip(after, before, strict=True)]
        assert sent[0] > WIRE * NBYTES
        assert max(sent[2:]) < NBYTES // 16  # what a kernel says to its neighbours


def test_a_lowered_rail_carries_nothing_the_other_goes_on_and_a_lifted_one_carries_again(
    both_rails: tuple[rails.Rail, rails.Rail], verbs: Verbs
) -> None:
    first, second = both_rails
    with rails.lowered(first):
        assert write_over(verbs, first) == RETRIES_EXCEEDED
        assert write_over(verbs, second) == SUCCESS
    assert write_over(verbs, first) == SUCCESS


def test_a_device_without_a_path_to_the_other_pair_says_so(
    both_rails: tuple[rails.Rail, rails.Rail], verbs: Verbs
) -> None:
    first, second = both_rails
    crossed = rails.Rail("", (first.devices[0], second.devices[0]), ("", ""))
    assert write_over(verbs, crossed) == RETRIES_EXCEEDED


def test_tools_of_the_distribution_see_the_devices(devices: list[str]) -> None:
    shown = subprocess.run(["ibv_devices"], capture_output=True, text=True, check=True).stdout
    assert all(device in shown for device in devices)
