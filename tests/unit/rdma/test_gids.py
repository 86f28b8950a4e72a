"""Which GID of a port is used, and what is said of two that do not fit."""

from __future__ import annotations

import ipaddress

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mooncake_engine import PathUnavailable
from mooncake_engine.topology import Priority
from mooncake_engine.transport.rdma.gids import Chosen, choose, crosses, mismatch, remarks
from mooncake_engine.transport.rdma.records import VERSION, DeviceRecord, RdmaEndpoint
from mooncake_engine.transport.rdma.verbs.base import GidEntry


def raw(address: str) -> bytes:
    """An IP address as a GID has it."""
    text = address if ":" in address else f"::ffff:{address}"
    return ipaddress.IPv6Address(text).packed


def entry(index: int, address: str, kind: str = "roce_v2", netdev: str = "eth0") -> GidEntry:
    return GidEntry(index, raw(address), kind, netdev)


def auto(*entries: GidEntry, link_layer: str = "ethernet") -> Chosen:
    return choose(entries, -1, link_layer)


RXE = (entry(0, "fe80::1"), entry(1, "10.77.0.1"))  # as Soft-RoCE on a veth has them
MLX5 = (
    entry(0, "fe80::1", "roce_v1"),
    entry(1, "fe80::1"),
    entry(2, "2001:db8::5", "roce_v1"),
    entry(3, "2001:db8::5"),
    entry(4, "192.168.3.5", "roce_v1"),
    entry(5, "192.168.3.5"),
)


@pytest.mark.parametrize(
    ("entries", "index"),
    [
        (RXE, 1),
        (MLX5, 5),
        (MLX5[:5], 3),  # IPv6 over RoCE v2 before IPv4 over v1
        (MLX5[:2], 1),
        (MLX5[::2], 4),  # v1 only
        (MLX5[:1], 0),
        ((entry(2, "169.254.7.7"), entry(3, "2001:db8::5")), 3),
        ((entry(2, "127.0.0.1"), entry(3, "10.0.0.1")), 3),
        ((entry(0, "fe80::1"), entry(2, "127.0.0.1")), 2),  # rxe on lo, to itself
        ((entry(6, "10.0.0.2"), entry(3, "10.0.0.1")), 3),
    ],
)
def test_a_routed_ipv4_address_on_roce_v2_is_the_first_choice(
    entries: tuple[GidEntry, ...], index: int
) -> None:
    chosen = auto(*entries)
    assert chosen.gid_index == index
    (same,) = [one for one in entries if one.gid_index == index]
    assert (chosen.raw, chosen.kind) == (same.raw, same.kind)


@given(st.permutations(MLX5), st.integers(1, 6))
def test_the_choice_does_not_depend_on_the_order(table: list[GidEntry], count: int) -> None:
    best = [5, 3, 1, 4, 2, 0]
    some = table[:count]
    there = {one.gid_index for one in some}
    assert auto(*some).gid_index == next(index for index in best if index in there)


def test_the_reason_names_the_address_and_what_it_was_chosen_from() -> None:
    assert auto(*RXE).reason == "GID 1 (RoCE v2, 10.77.0.1 on eth0): first choice of 2"
    assert auto(RXE[1]).reason == "GID 1 (RoCE v2, 10.77.0.1 on eth0): the only one"
    assert choose(RXE, 0, "ethernet").reason == "GID 0 (RoCE v2, fe80::1 on eth0): as configured"


def test_infiniband_uses_index_0() -> None:
    ports = [entry(i, f"fe80::{i + 1}", "ib", "") for i in range(3)]
    chosen = auto(*ports, link_layer="infiniband")
    assert (chosen.gid_index, chosen.kind) == (0, "ib")
    assert chosen.reason.startswith("GID 0 (InfiniBand, fe80::1): ")


@pytest.mark.parametrize("index", range(6))
def test_a_configured_index_is_taken_whatever_it_is(index: int) -> None:
    assert choose(MLX5, index, "ethernet")[:3] == (index, MLX5[index].raw, MLX5[index].kind)


def test_a_configured_index_that_is_not_there_is_refused_with_what_is_there() -> None:
    with pytest.raises(PathUnavailable, match="no GID 3") as refused:
        choose(RXE, 3, "ethernet")
    assert "MC_GID_INDEX" in str(refused.value)
    assert "0: RoCE v2, fe80::1 on eth0; 1: RoCE v2, 10.77.0.1 on eth0" in str(refused.value)


@pytest.mark.parametrize(
    ("entries", "link_layer", "says"),
    [
        ((), "ethernet", "none is set.*give its network interface an address"),
        ((entry(0, "fe80::1", "ib"),), "ethernet", "no RoCE GID.*InfiniBand, fe80::1"),
        ((), "infiniband", "no GID 0.*subnet manager"),
        ((entry(1, "fe80::1", "ib", ""),), "infiniband", "no GID 0.*1: InfiniBand, fe80::1"),
    ],
)
def test_a_port_without_a_gid_of_its_kind_is_refused(
    entries: tuple[GidEntry, ...], link_layer: str, says: str
) -> None:
    with pytest.raises(PathUnavailable, match=says):
        choose(entries, -1, link_layer)


def nic(
    name: str = "mlx5_0",
    address: str = "10.0.0.1",
    kind: str = "roce_v2",
    link_layer: str = "ethernet",
    mtu: int = 4096,
    lid: int = 0,
) -> DeviceRecord:
    return DeviceRecord(name, 1, lid, raw(address), kind, link_layer, mtu, 0, True, 16)


def ib(name: str, prefix: str = "fe80::", lid: int = 7) -> DeviceRecord:
    return nic(name, f"{prefix}2", "ib", "infiniband", lid=lid)


def test_equal_nics_fit_and_nothing_is_remarked() -> None:
    for ours, theirs in (
        (nic(), nic("mlx5_1", "10.0.9.2")),
        (nic(address="2001:db8::1"), nic(address="2001:db8::2")),
        (ib("mlx5_0"), ib("mlx5_1")),
    ):
        assert mismatch(ours, theirs) == ""
        assert remarks(ours, theirs, 4096) == ""
        assert not crosses(ours, theirs)


@pytest.mark.parametrize(
    ("theirs", "says"),
    [
        (ib("ib0"), ["mlx5_0 is on ethernet", "ib0 on infiniband"]),
        (nic("r1", kind="roce_v1"), ["mlx5_0 uses RoCE v2", "r1 RoCE v1", "MC_GID_INDEX"]),
        (nic("r1", "2001:db8::2"), ["IPv4 (10.0.0.1)", "r1 IPv6 (2001:db8::2)"]),
    ],
)
def test_what_cannot_work_is_named_from_either_side(theirs: DeviceRecord, says: list[str]) -> None:
    text = mismatch(nic(), theirs)
    assert all(part in text for part in says)
    assert mismatch(theirs, nic())


def test_infiniband_subnets_that_differ_are_named_and_crossed_by_a_router() -> None:
    ours, theirs = ib("a"), ib("b", "fec0:0:0:7::")
    assert mismatch(ours, theirs) == ""
    assert crosses(ours, theirs)
    assert "fe80000000000000 and fec0000000000007" in remarks(ours, theirs, 4096)
    assert not crosses(nic(), nic(address="10.9.9.9"))  # on RoCE this is IP's business


@pytest.mark.parametrize(("ours", "theirs"), [(0, 7), (7, 0)])
def test_a_port_that_no_subnet_manager_has_seen_is_named(ours: int, theirs: int) -> None:
    text = remarks(ib("a", lid=ours), ib("b", lid=theirs), 4096)
    assert text.startswith(f"{'b' if ours else 'a'} has no LID")


@pytest.mark.parametrize(
    ("ours", "theirs", "wanted", "used"), [(4096, 1024, 4096, 1024), (2048, 4096, 512, 512)]
)
def test_mtus_that_differ_are_named_with_the_one_in_use(
    ours: int, theirs: int, wanted: int, used: int
) -> None:
    text = remarks(nic("a", mtu=ours), nic("b", mtu=theirs), wanted)
    assert f"the MTU of a is {ours} and of b {theirs}: {used} is used" in text


def test_an_address_of_one_link_only_is_named() -> None:
    text = remarks(nic("a", "169.254.3.3"), nic("b", "10.0.0.1"), 4096)
    assert "a has an address of its link only (169.254.3.3), and b a routed one (10.0.0.1)" in text


def test_a_record_travels_in_the_segment_record_and_bad_ones_are_refused() -> None:
    record = RdmaEndpoint(
        "10.0.0.1",
        15001,
        VERSION,
        (nic(), ib("mlx5_1")),
        {"cpu:0": Priority(("mlx5_0",), ("mlx5_1",))},
    )
    blob = msgspec.msgpack.encode(record)
    assert msgspec.msgpack.decode(blob, type=RdmaEndpoint) == record
    for bad in (
        msgspec.structs.replace(nic(), gid=b"short"),
        msgspec.structs.replace(nic(), port=0),
        msgspec.structs.replace(nic(), lid=1 << 16),
        msgspec.structs.replace(nic(), active_mtu=9000),
    ):
        blob = msgspec.msgpack.encode(msgspec.structs.replace(record, devices=(bad,)))
        with pytest.raises(msgspec.ValidationError):
            msgspec.msgpack.decode(blob, type=RdmaEndpoint)
