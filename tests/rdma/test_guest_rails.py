"""The guest itself: what the tests of several rails rest on."""

from __future__ import annotations

import contextlib
import errno
import subprocess
from typing import TYPE_CHECKING

import numpy as np
import pytest
import rails
from harness.verbs_sides import Side, binding
from mooncake_engine.transport.rdma.verbs.base import Opcode, VerbsError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mooncake_engine.transport.rdma.verbs.base import Verbs

SUCCESS, RETRIES_EXCEEDED = 0, 12
# What a queue pair says whose interface went down: no route here (2 with kernel 6.1; 5 with 6.12,
# flushed and no cause given), or silence until its tries are over.
CUT_OFF = {2, 5, RETRIES_EXCEEDED}
NBYTES = 1 << 16
WIRE = 0.9  # of the bytes; the rest is room for what a counter may miss, headers come on top


@pytest.fixture(scope="module")
def verbs() -> Verbs:
    return binding()


@contextlib.contextmanager
def connected(verbs: Verbs, names: tuple[str, str]) -> Iterator[tuple[Side, Side]]:
    """From one device to another."""
    with Side(verbs, names[0], psn=3) as ours, Side(verbs, names[1], psn=5) as theirs:
        ours.connect(theirs)
        theirs.connect(ours)
        yield ours, theirs


def write(ours: Side, theirs: Side) -> int:
    """Write from one to the other; the status, which the bytes bear out."""
    ours.data[:NBYTES] = np.random.default_rng().integers(0, 256, NBYTES, np.uint8)
    assert ours.post(Opcode.WRITE, theirs, [(0, [(0, NBYTES)])]) == 1
    (end,) = ours.completions(1)
    arrived = bool((theirs.data[:NBYTES] == ours.data[:NBYTES]).all())
    assert arrived == (end["status"] == SUCCESS)
    return int(end["status"])


def write_over(verbs: Verbs, rail: rails.Rail) -> int:
    with connected(verbs, rail.devices) as sides:
        return write(*sides)


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


def test_a_rail_that_is_lowered_carries_nothing_and_the_other_goes_on(
    both_rails: tuple[rails.Rail, rails.Rail], verbs: Verbs
) -> None:
    first, second = both_rails
    with connected(verbs, first.devices) as sides:
        assert write(*sides) == SUCCESS
        with rails.lowered(first):
            assert write(*sides) in CUT_OFF
            assert write_over(verbs, second) == SUCCESS


def test_a_lowered_rail_takes_no_connection_and_a_lifted_one_does(
    both_rails: tuple[rails.Rail, rails.Rail], verbs: Verbs
) -> None:
    first, _ = both_rails
    with rails.lowered(first), pytest.raises(VerbsError) as refused:
        write_over(verbs, first)
    assert refused.value.errno == errno.ENETUNREACH
    assert write_over(verbs, first) == SUCCESS


def test_there_is_no_path_from_one_rail_to_the_other(
    both_rails: tuple[rails.Rail, rails.Rail], verbs: Verbs
) -> None:
    first, second = both_rails
    with connected(verbs, (first.devices[0], second.devices[0])) as sides:
        assert write(*sides) == RETRIES_EXCEEDED


def test_tools_of_the_distribution_see_the_devices(devices: list[str]) -> None:
    shown = subprocess.run(["ibv_devices"], capture_output=True, text=True, check=True).stdout
    assert all(device in shown for device in devices)
