"""The conformance suite over each transport, target in this or in a child process."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import msgspec
import pytest
from mooncake_engine import EngineConfig, MetadataConfig, Status, TcpConfig, TransferEngine
from mooncake_engine.testing import conformance
from mooncake_engine.testing.faults import Faults, install
from mooncake_engine.testing.target import ChildTarget, LocalTarget
from native_loops import needs_native

if TYPE_CHECKING:
    from collections.abc import Iterator


def config(scheme: str, host: str = "127.0.0.1", *, native: bool = True) -> EngineConfig:
    return EngineConfig(
        protocol=scheme,
        strict_transport=True,
        host=host,
        tcp=TcpConfig(min_port=0, max_port=0, native=native),
        metadata=MetadataConfig(p2p_min_port=0, p2p_max_port=0),
    )


@contextlib.contextmanager
def pair_of(scheme: str, where: str, length: int) -> Iterator[conformance.Pair]:
    kind = LocalTarget if where in {"here", "ipv6"} else ChildTarget
    settings = config(scheme, "::1" if where == "ipv6" else "127.0.0.1", native=where != "python")
    if where == "native":
        needs_native()
    with kind(settings, length) as target, TransferEngine(settings) as initiator:
        yield conformance.Pair(initiator, target, target_has_a_say=scheme != "shm")


KINDS = (
    ("loopback", "here"),
    ("tcp", "native"),  # these two with a child: moved and served by C, and by its Python twin
    ("tcp", "python"),
    ("shm", "here"),
    ("shm", "child"),
)
CASES = [
    pytest.param(check, *kind, id=f"{' '.join(kind)}-{check.name}")
    for kind in KINDS
    for check in conformance.CHECKS
    if (kind[1] != "here" or not check.needs_child)
    # Nobody serves shm but the kernel; its reader confirms with the grant's owner instead.
    and (kind[0] != "shm" or not check.needs_say)
]


@pytest.mark.parametrize(("check", "scheme", "where"), CASES)
def test_a_transport_keeps_the_contract(check: conformance.Check, scheme: str, where: str) -> None:
    with pair_of(scheme, where, check.length) as pair:
        assert check.applies(pair)
        check.run(pair)


@contextlib.contextmanager
def pair_without_shm(check: conformance.Check) -> Iterator[conformance.Pair]:
    """Segments open over shm, which is lost from the first slice on; tcp stands in."""
    lenient = msgspec.structs.replace(config("shm"), strict_transport=False)
    kind = ChildTarget if check.needs_child else LocalTarget
    with kind(lenient, check.length) as target, TransferEngine(lenient) as initiator:
        pair = conformance.Pair(initiator, target, target_has_a_say=True)
        lost = Faults()
        lost.lose("shm is taken away for this test")
        install(initiator, lost, "shm")
        initiator.transports.pop("rdma", None)  # where there are NICs, it would be next
        yield pair


@pytest.mark.parametrize(
    "check", [pytest.param(check, id=check.name) for check in conformance.CHECKS]
)
def test_a_path_that_stands_in_keeps_the_contract(check: conformance.Check) -> None:
    with pair_without_shm(check) as pair:
        assert check.applies(pair)
        check.run(pair)
        ended_ok = {key.scheme for key in pair.initiator.statistics() if key.status is Status.OK}
        assert ended_ok <= {"tcp"}


def test_tcp_moves_bytes_over_ipv6_too() -> None:
    with pair_of("tcp", "ipv6", conformance.MIB) as pair:
        conformance.single_bytes_arrive_exactly(pair)
        assert "[::1]:" in pair.open().name


def test_auto_takes_shm_on_one_machine_and_says_so() -> None:
    with pair_of("auto", "child", conformance.MIB) as pair:
        conformance.adjacent_runs_travel_as_one(pair)
        assert pair.open().path.scheme == "shm"
        assert pair.open().path.reason == "same machine; rdma, tcp not tried"
