"""The conformance suite over real verbs: one rail and two, target in this or in a child process."""

from __future__ import annotations

import pytest
from mooncake_engine.testing import conformance
from rdma_stage import OURS, THEIRS, pair_of

#: An emulated processor takes ten seconds to start a child: only what needs one has one. The
#: kernel's own short cut between a device and itself is another path through the driver.
KINDS = (
    ("here", OURS[:1], THEIRS[:1], False, lambda check: not check.needs_child),
    ("child", OURS[:1], THEIRS[:1], True, lambda check: check.needs_child),
    ("one device", OURS[:1], OURS[:1], False, lambda check: check.name.startswith("scattered")),
    ("two rails", OURS, THEIRS, False, lambda check: check.name.startswith(("scat", "concurrent"))),
)
CASES = [
    pytest.param(check, ours, theirs, child, id=f"{name}-{check.name}")
    for name, ours, theirs, child, wanted in KINDS
    for check in conformance.CHECKS
    # Nobody serves RDMA but the NIC; its reader confirms with the grant's owner instead.
    if wanted(check) and not check.needs_say
]


@pytest.mark.parametrize(("check", "ours", "theirs", "child"), CASES)
def test_rdma_keeps_the_contract(
    check: conformance.Check, ours: tuple[str, ...], theirs: tuple[str, ...], *, child: bool
) -> None:
    with pair_of(check.length, ours, theirs, child=child) as pair:
        assert check.applies(pair)
        check.run(pair)
