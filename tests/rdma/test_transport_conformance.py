"""The conformance suite over real verbs: one rail and two, target in this or in a child process."""

from __future__ import annotations

import pytest
from mooncake_engine.testing import conformance
from rdma_stage import OURS, THEIRS, pair_of

KINDS = (
    ("one rail, child", OURS[:1], THEIRS[:1], True),
    ("one device, here", OURS[:1], OURS[:1], False),
    ("two rails, child", OURS, THEIRS, True),
)
#: Soft-RoCE under emulation moves 5 to 15 MB/s: the big ones are run once.
BIG = 16 * conformance.MIB
CASES = [
    pytest.param(check, ours, theirs, child, id=f"{name}-{check.name}")
    for name, ours, theirs, child in KINDS
    for check in conformance.CHECKS
    # Nobody serves RDMA but the NIC; its reader confirms with the grant's owner instead.
    if not check.needs_say and (child or not check.needs_child)
    if check.length < BIG or name == "one rail, child"
]


@pytest.mark.parametrize(("check", "ours", "theirs", "child"), CASES)
def test_rdma_keeps_the_contract(
    check: conformance.Check, ours: tuple[str, ...], theirs: tuple[str, ...], *, child: bool
) -> None:
    with pair_of(check.length, ours, theirs, child=child) as pair:
        assert check.applies(pair)
        check.run(pair)
