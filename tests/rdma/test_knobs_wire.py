"""Each knob that packets show: captured where they come in, in the guest."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import rails
from mooncake_engine.types import Op
from rdma_stage import OURS, THEIRS
from rdma_watch import MIB, two
from roce_capture import READ, WRITES, Capture

if TYPE_CHECKING:
    from collections.abc import Iterator

KIB = 1 << 10

pytestmark = pytest.mark.skipif(
    not rails.in_guest(), reason="packets are captured on interfaces that only the guest has"
)


def udp_port(flow_label: int) -> int:
    """As the kernel folds a flow label into the source port of RoCE v2."""
    return 0xC000 | (flow_label & 0x3FFF) ^ (flow_label >> 14)


@pytest.mark.parametrize(
    ("traffic_class", "mtu", "flow_label"), [(106, 1024, 0x12345), (-1, 4096, 0xFEDCB)]
)
def test_packets_have_the_traffic_class_the_length_and_the_port_that_were_set(
    traffic_class: int, mtu: int, flow_label: int
) -> None:
    settings: dict[str, Any] = {
        "traffic_class": traffic_class,
        "mtu": mtu,
        "flow_label": flow_label,
        "hop_limit": 9,
    }
    with (
        Capture(THEIRS[0]) as requests,
        Capture(OURS[0]) as responses,
        two(num_qp=1, **settings) as (near, far),
    ):
        near.read(far, (0, 0, 64 * KIB))
        assert near.move(Op.WRITE, far, (0, 0, 64 * KIB)).ok
        seen = requests.packets() + responses.packets()
        read, written = responses.responses(), requests.packets(*WRITES)
    assert {packet.traffic_class for packet in seen} == {max(0, traffic_class)}
    assert {packet.source_port for packet in seen} == {udp_port(flow_label)}
    # An acknowledgement's 4 bytes in the first and the last; a RETH's 16 in the first.
    assert max(packet.payload for packet in read) == mtu + 4
    assert max(packet.payload for packet in written) == mtu + 16
    # For RoCE Linux takes the route's, whatever was set.
    routes = int(Path("/proc/sys/net/ipv4/ip_default_ttl").read_text())
    assert {packet.hop_limit for packet in seen} == {routes}


@pytest.mark.parametrize(
    ("slice_bytes", "ratio", "wanted"),
    [
        (64 * KIB, 4, [64, 64, 72]),  # 8 KiB left over are less than a quarter of 64
        (64 * KIB, 8, [64, 64, 64, 8]),
        (32 * KIB, 4, [32, 32, 32, 32, 32, 32, 8]),
        (MIB, 4, [200]),
    ],
)
def test_requests_are_as_long_as_was_said_and_a_short_tail_joins(
    slice_bytes: int, ratio: int, wanted: list[int]
) -> None:
    settings = {"slice_bytes": slice_bytes, "fragment_ratio": ratio}
    with Capture(THEIRS[0]) as capture, two(initiator=settings) as (near, far):
        near.read(far, (4096, 512, 200 * KIB))
        asked = capture.requests(READ)
    assert [length // KIB for _, length in asked] == wanted
    assert asked[0][0] == far.address + 512


@pytest.mark.parametrize(("max_sge", "count"), [(1, 8), (2, 4), (8, 1)])
def test_a_request_takes_as_many_pieces_of_our_memory_as_was_said(max_sge: int, count: int) -> None:
    runs = [(8 * KIB * i, 4 * KIB * i, 4 * KIB) for i in range(8)]  # apart here, together there
    settings = {"max_sge": max_sge, "max_inline": 16}  # Soft-RoCE gives entries where inline fits
    with Capture(THEIRS[0]) as capture, two(initiator=settings) as (near, far):
        near.read(far, *runs)
        assert len(capture.requests(READ)) == count


@pytest.fixture
def second_address() -> Iterator[tuple[int, str]]:
    """Another address of the first device: its GID index, and the address."""
    (here, there), address = rails.A.addresses, "10.77.0.20"
    ours, theirs = (rails.interface(device) for device in rails.A.devices)
    mac = Path(f"/sys/class/net/{ours}/address").read_text().strip()
    added = (  # as rails.sh does for the first one
        f"addr add {address}/24 dev {ours}",
        f"rule add pref 30 from {address} to {there} lookup 100",
        f"rule add pref 31 from {there} to {address} lookup 101",
    )
    _ip(*added, f"route replace {address} dev {theirs} table 101")
    _ip(f"neigh replace {address} lladdr {mac} dev {theirs}")
    try:
        gids = Path(f"/sys/class/infiniband/{OURS[0]}/ports/1/gids")
        wanted = "0000:0000:0000:0000:0000:ffff:0a4d:0014"
        deadline = time.monotonic() + 10
        while not (rows := [row for row in gids.iterdir() if row.read_text().strip() == wanted]):
            assert time.monotonic() < deadline, f"the kernel made no GID for {address} on {here}"
            time.sleep(0.05)
        yield int(rows[0].name), address
    finally:
        _ip(*(line.replace(" add ", " del ") for line in reversed(added)))


def _ip(*lines: str) -> None:
    for line in lines:
        subprocess.run(["ip", *line.split()], check=True)


def test_packets_come_from_the_address_of_the_gid_that_was_chosen(
    second_address: tuple[int, str],
) -> None:
    index, address = second_address
    for settings, source in (({}, rails.A.addresses[0]), ({"gid_index": index}, address)):
        with Capture(THEIRS[0]) as capture, two(initiator=settings) as (near, far):
            near.read(far, (0, 0, 64 * KIB))
            used = {pair.query()["sgid_index"] for pair in near.queue_pairs}
            assert used == {settings.get("gid_index", 1)}
            assert {packet.source for packet in capture.packets()} == {source}


@pytest.mark.parametrize("in_turn", [False, True])
def test_requests_go_over_rails_in_turn_or_in_contiguous_shares(*, in_turn: bool) -> None:
    settings = {"path_round_robin": in_turn, "slice_bytes": 4 * KIB}
    with (
        Capture(THEIRS[0]) as first,
        Capture(THEIRS[1]) as second,
        two(ours=OURS, theirs=THEIRS, initiator=settings) as (near, far),
    ):
        near.read(far, (0, 0, 128 * KIB))
        places = [
            [(remote - far.address) // (4 * KIB) for remote, _ in capture.requests(READ)]
            for capture in (first, second)
        ]
    halves = [list(range(32))[i::2] if in_turn else list(range(32))[16 * i :][:16] for i in (0, 1)]
    assert sorted(places) == sorted(halves)


CHOSEN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "devices": ({"devices": OURS[1:]}, {"devices": THEIRS[1:]}),
    "devices_excluded": ({"devices_excluded": OURS[:1]}, {"devices_excluded": THEIRS[:1]}),
    "topology_file": (
        {"topology_file": '{"cpu:0": [["rxe2"], ["rxe0"]]}'},
        {"topology_file": '{"cpu:0": [["rxe3"], ["rxe1"]]}'},
    ),
}


@pytest.mark.parametrize("knob", CHOSEN)
def test_only_the_nics_that_were_chosen_carry_bytes(knob: str) -> None:
    ours, theirs = CHOSEN[knob]
    with (
        Capture(THEIRS[0]) as idle,
        Capture(THEIRS[1]) as busy,
        two(ours=OURS, theirs=THEIRS, initiator=ours, target=theirs) as (near, far),
    ):
        near.read(far, (0, 0, 256 * KIB))
        assert sum(length for _, length in busy.requests(READ)) == 256 * KIB
        assert not idle.requests(READ)


def test_measured_pairs_carry_the_bytes(tmp_path: Path) -> None:
    table = tmp_path / "rails.json"
    table.write_text('{"all": [{"local": "rxe2", "remote": "rxe3"}]}')
    with (
        Capture(THEIRS[0]) as idle,
        Capture(THEIRS[1]) as busy,
        two(ours=OURS, theirs=THEIRS, initiator={"rail_topology_file": str(table)}) as (near, far),
    ):
        near.read(far, (0, 0, 256 * KIB))
        assert sum(length for _, length in busy.requests(READ)) == 256 * KIB
        assert not idle.requests(READ)


@pytest.mark.parametrize("affinity", [False, True])
def test_the_peers_nic_of_the_same_name_is_preferred_when_asked_for(*, affinity: bool) -> None:
    with (
        Capture(OURS[0]) as capture,
        two(
            ours=THEIRS[:1],
            theirs=(OURS[0], THEIRS[0]),
            initiator={"dest_device_affinity": affinity, "slice_bytes": 4 * KIB},
        ) as (near, far),
    ):
        near.read(far, (0, 0, 64 * KIB))
        # From a device to itself nothing goes over the wire.
        assert bool(capture.requests(READ)) != affinity
