"""For tests on real verbs. They never pass by finding nothing to test."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import rails
from rdma_ends import End, Pair
from rdma_stage import OURS, THEIRS
from rdma_watch import kernel_counts

if TYPE_CHECKING:
    from collections.abc import Iterator

SYSFS = Path("/sys/class/infiniband")


@pytest.fixture(scope="session")
def devices() -> list[str]:
    """Names of this machine's RDMA devices, at least one: rxe0 to rxe3 in the guest."""
    found = sorted(entry.name for entry in SYSFS.iterdir()) if SYSFS.is_dir() else []
    if not found:
        pytest.fail(
            "no RDMA device here: `scripts/test rdma` runs this in a guest that has some; "
            "`rdma link add rxe0 type rxe netdev INTERFACE` makes one",
            pytrace=False,
        )
    return found


@pytest.fixture
def both_rails(devices: list[str]) -> Iterator[tuple[rails.Rail, rails.Rail]]:
    """Rails A and B, both up at the beginning and again at the end, whatever the test does."""
    if not rails.in_guest():
        pytest.skip("a rail is taken down in the guest only, never on a machine's own devices")
    assert devices == [*rails.A.devices, *rails.B.devices]
    for rail in (rails.A, rails.B):
        rails.lift(rail)
    yield rails.A, rails.B
    for rail in (rails.A, rails.B):
        rails.lift(rail)


@pytest.fixture(scope="module")
def engines(devices: list[str]) -> Iterator[Pair]:
    """An initiator and a target for a whole file; they leave nothing in the kernel."""
    assert set(OURS[:1] + THEIRS[:1]) <= set(devices)
    before = [kernel_counts(name) for name in (OURS[0], THEIRS[0])]
    with End(THEIRS[:1]) as theirs, End(OURS[:1]) as ours:
        pair = Pair(ours, theirs)
        pair.check_serves()  # and starts the threads that an engine keeps
        yield pair
    assert [kernel_counts(name) for name in (OURS[0], THEIRS[0])] == before


@pytest.fixture
def pair(engines: Pair) -> Iterator[Pair]:
    """Both are filled before, and serve afterwards."""
    engines.fill()
    yield engines
    engines.check_serves()
