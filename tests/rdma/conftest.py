"""For tests on real verbs. They never pass by finding nothing to test."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import rails

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
