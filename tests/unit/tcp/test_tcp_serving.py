"""What the serving side does with strangers, stopped peers, revoked grants and closed doors."""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import threading
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
from mooncake_engine.errors import LaneError, PathUnavailable
from mooncake_engine.hosts import default_address
from mooncake_engine.transport.tcp import wire
from mooncake_engine.types import Op, Status
from tcp_sides import (
    Side,
    greeted_socket,
    received_until_the_end,
    slice_of,
    soon,
    until,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from mooncake_engine.transport.base import Lane
    from mooncake_engine.types import SegmentRecord

    Start = Callable[..., Side]
    OpenLane = Callable[[Side, SegmentRecord], Lane]

MIB = 1 << 20
U64 = (1 << 64) - 1


def request_for(side: Side, op: Op, nbytes: int, grant: bytes = b"") -> bytes:
    """A request for the whole of `nbytes` at the start of the side's memory."""
    return wire.pack_request(slice_of(op, [1], [side.address], [nbytes], grant), 1)


def raw_request(
    op: int = 1, runs: int = 1, nbytes: int = 8, lengths: tuple[int, ...] = (8,), grant: int = 0
) -> bytes:
    tables = np.array([1 << 20] * len(lengths) + list(lengths), np.uint64).tobytes()
    frame = wire.REQUEST.pack(op, grant, runs, nbytes, 1) + tables
    return frame.ljust(-(-len(frame) // wire.ALIGN) * wire.ALIGN, b"\0")


def still_serves(start: Start, open_lane: OpenLane, target: Side) -> None:
    initiator = start()
    lane = open_lane(initiator, target.record)
    target.memory[:8] = 3
    lane.move(slice_of(Op.READ, [initiator.address], [target.address], [8]), soon())
    assert (initiator.memory[:8] == 3).all()


@pytest.mark.parametrize(
    "garbage",
    [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\0" * 4096, b"mooncakf" + b"x" * 100],
)
def test_a_stranger_is_closed_with_one_logged_line_and_harms_nobody(
    start: Start, open_lane: OpenLane, caplog: pytest.LogCaptureFixture, garbage: bytes
) -> None:
    target = start()
    with socket.create_connection(("127.0.0.1", target.port)) as stranger:
        stranger.settimeout(10)
        stranger.sendall(garbage)
        assert received_until_the_end(stranger) == b""
    still_serves(start, open_lane, target)
    lines = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(lines) == 1
    assert "it speaks another protocol" in lines[0]


def test_a_hello_that_stops_half_way_is_closed_after_the_connect_timeout(
    start: Start, open_lane: OpenLane
) -> None:
    target = start()
    with socket.create_connection(("127.0.0.1", target.port)) as stranger:
        stranger.settimeout(10)
        stranger.sendall(wire.pack_hello("first")[:20])
        assert received_until_the_end(stranger) == b""
    still_serves(start, open_lane, target)


def test_another_version_is_told_ours(start: Start) -> None:
    target = start()
    with socket.create_connection(("127.0.0.1", target.port)) as other:
        other.settimeout(10)
        other.sendall(wire.HELLO.pack(wire.MAGIC, 99, b"first"))
        welcome = wire.unpack_welcome(received_until_the_end(other))
    assert welcome.verdict is wire.Verdict.OTHER_VERSION
    assert welcome.version == wire.VERSION


@pytest.mark.parametrize(
    "frame",
    [
        raw_request(op=3),
        raw_request(runs=0),
        raw_request(runs=1025),
        raw_request(runs=(1 << 32) - 1),
        raw_request(nbytes=0),
        raw_request(nbytes=U64),
        raw_request(nbytes=(1 << 30) + 1),
        raw_request(grant=1025),
        raw_request(nbytes=8, lengths=(9,)),
        raw_request(nbytes=8, lengths=(0,)),
        raw_request(nbytes=8, runs=2, lengths=(U64, 9)),  # adds up to 8 when it wraps
        raw_request(nbytes=8, runs=2, lengths=(8, 0)),
    ],
)
def test_a_malformed_frame_closes_its_lane_and_no_other(
    start: Start, open_lane: OpenLane, caplog: pytest.LogCaptureFixture, frame: bytes
) -> None:
    target = start()
    with greeted_socket(target.port) as peer:
        peer.sendall(frame)
        assert received_until_the_end(peer) == b""
    still_serves(start, open_lane, target)
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1


def test_half_a_header_and_then_silence_loses_the_lane(start: Start, open_lane: OpenLane) -> None:
    target = start(send_timeout_s=0.1)
    with greeted_socket(target.port) as peer:
        peer.sendall(request_for(target, Op.READ, 8)[:10])
        assert received_until_the_end(peer) == b""
    still_serves(start, open_lane, target)


def test_an_idle_lane_outlives_the_send_timeout(start: Start, open_lane: OpenLane) -> None:
    initiator, target = start(), start(send_timeout_s=0.05)
    lane = open_lane(initiator, target.record)
    with greeted_socket(target.port) as peer:  # a second idle lane, which must stay open as well
        assert not select.select([peer], [], [], 0.3)[0]
    streams = lane._streams
    lane.move(slice_of(Op.READ, [initiator.address], [target.address], [8]), soon())
    assert lane._streams is streams  # not even opened anew


def test_a_reader_that_stopped_taking_bytes_loses_its_lane(
    start: Start, open_lane: OpenLane
) -> None:
    target = start(size=64 * MIB, send_timeout_s=0.1)
    with greeted_socket(target.port) as peer:
        peer.sendall(request_for(target, Op.READ, 64 * MIB))
        until(lambda: not target.transport._server._lanes, "the end of the serving thread")
        assert 0 < len(received_until_the_end(peer)) < 64 * MIB
    still_serves(start, open_lane, target)


def test_revoking_a_grant_ends_a_read_that_is_being_served(start: Start) -> None:
    target = start(size=64 * MIB)
    target.memory[:] = 1
    target.grants.add(b"room")
    with greeted_socket(target.port) as peer:
        peer.sendall(request_for(target, Op.READ, 64 * MIB, b"room"))
        assert select.select([peer], [], [], 10)[0]  # it is being served, and we do not read
        began = time.monotonic()
        target.grants.revoke(b"room")
        assert time.monotonic() - began < 5  # the send time-out would take 10
        target.memory[:] = 2  # the owner's pages have a new life now
        arrived = received_until_the_end(peer)[wire.ANSWER.size :]
    assert 0 < len(arrived) < 64 * MIB
    assert set(arrived) == {1}


def test_revoking_a_grant_ends_a_write_before_its_late_bytes(start: Start) -> None:
    target = start()
    target.grants.add(b"room")
    with greeted_socket(target.port) as peer:
        peer.sendall(request_for(target, Op.WRITE, MIB, b"room") + b"\1" * 1000)
        until(lambda: target.memory[999] == 1, "the first bytes of the write")
        target.grants.revoke(b"room")
        target.memory[:] = 2
        with contextlib.suppress(ConnectionError):
            peer.sendall(b"\1" * (MIB - 1000))
        assert received_until_the_end(peer) == b""
    assert (target.memory == 2).all()


def test_unregistering_memory_ends_the_reads_of_it(start: Start) -> None:
    target = start(size=64 * MIB)
    target.memory[:] = 1
    with greeted_socket(target.port) as peer:
        peer.sendall(request_for(target, Op.READ, 64 * MIB))
        assert select.select([peer], [], [], 10)[0]
        began = time.monotonic()
        target.regions.remove(target.address)
        assert time.monotonic() - began < 5  # interrupted; the send time-out would take 10
        target.memory[:] = 2
        arrived = received_until_the_end(peer)[wire.ANSWER.size :]
    assert len(arrived) < 64 * MIB
    assert set(arrived) == {1}


@pytest.mark.parametrize("op", [Op.READ, Op.WRITE])
def test_a_grant_revoked_in_mid_slice_is_told_as_a_refusal(
    start: Start, open_lane: OpenLane, op: Op
) -> None:
    initiator, target = start(), start()
    target.grants.add(b"room")
    lane = open_lane(initiator, target.record)
    # 1 GiB takes a good part of a second; a revoke that came before or after is refused as well.
    piece = slice_of(op, [initiator.address] * 1024, [target.address] * 1024, [MIB] * 1024, b"room")
    caught: list[LaneError] = []

    def move_on() -> None:
        try:
            while True:
                lane.move(piece, soon(30))
        except LaneError as error:
            caught.append(error)

    (target if op is Op.READ else initiator).memory[:] = 1
    thread = threading.Thread(target=move_on)
    thread.start()
    until(lambda: initiator.memory[0] == target.memory[0] == 1, "the first byte")
    target.grants.revoke(b"room")
    thread.join(20)
    assert [error.status for error in caught] == [Status.REFUSED]
    assert f"grant {b'room'.hex()} has ended" in str(caught[0])


def test_the_end_of_one_grant_fails_no_slice_of_the_next(start: Start, open_lane: OpenLane) -> None:
    initiator, target = start(), start()
    lane = open_lane(initiator, target.record)
    for number in range(300):  # the revoke often meets a thread that did not notice its last byte
        grant = number.to_bytes(2)
        target.memory[:8] = number % 251
        target.grants.add(grant)
        piece = slice_of(Op.READ, [initiator.address], [target.address], [8], grant)
        lane.move(piece, soon())
        target.grants.revoke(grant)
        assert (initiator.memory[:8] == number % 251).all()


@pytest.mark.parametrize("loops", ["C", "Python"], indirect=True)  # one connection
def test_a_lane_beyond_the_cap_is_refused_until_another_leaves(
    start: Start, open_lane: OpenLane
) -> None:
    initiator, target = start(), start(max_served_lanes=2)
    first = open_lane(initiator, target.record)
    open_lane(initiator, target.record)
    with pytest.raises(PathUnavailable, match=r"raise tcp\.max_served_lanes there"):
        initiator.transport.connect(target.record)
    first.close()
    until(lambda: len(target.transport._server._served) < 2, "the end of the first lane")
    still_serves(start, open_lane, target)


def test_strangers_beyond_the_cap_do_not_keep_peers_out(start: Start, open_lane: OpenLane) -> None:
    target = start(max_served_lanes=1)
    with contextlib.ExitStack() as strangers:
        for _ in range(10):
            address = ("127.0.0.1", target.port)
            strangers.enter_context(socket.create_connection(address))
        still_serves(start, open_lane, target)


def test_closing_ends_lanes_in_every_state(start: Start, open_lane: OpenLane) -> None:
    initiator, target = start(), start(size=64 * MIB)
    lane = open_lane(initiator, target.record)  # idle
    with (
        socket.create_connection(("127.0.0.1", target.port)),  # not greeted
        greeted_socket(target.port) as peer,
    ):
        peer.sendall(request_for(target, Op.READ, 64 * MIB))  # being served
        assert select.select([peer], [], [], 10)[0]
        began = time.monotonic()
        target.transport.close()
        assert time.monotonic() - began < 5
        target.transport.close()
        with pytest.raises(LaneError) as caught:
            lane.move(slice_of(Op.READ, [initiator.address], [target.address], [8]), soon())
    assert caught.value.status is Status.PEER_GONE


def test_the_port_is_the_first_free_one_and_a_full_range_is_named(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            PathUnavailable, match=rf"cannot listen on 127\.0\.0\.1, tcp ports {port}-{port}"
        ):
            start(min_port=port, max_port=port)
        beside = start(min_port=port, max_port=min(port + 50, 65535))
        assert port < beside.port <= port + 50


@pytest.mark.parametrize("ports", [(5, 4), (0, 17000), (17000, 0)])
def test_a_range_that_is_none_is_named(start: Start, ports: tuple[int, int]) -> None:
    with pytest.raises(PathUnavailable, match=f"{ports[0]}-{ports[1]} are no range"):
        start(min_port=ports[0], max_port=ports[1])


@pytest.mark.parametrize("host", ["192.0.2.7", "no such host"])
def test_an_address_that_is_not_ours_is_named(start: Start, host: str) -> None:
    with pytest.raises(PathUnavailable, match=r"set tcp\.bind_address to an address of this"):
        start(host=host, min_port=20000, max_port=65000)


def test_the_bind_address_is_the_host_unless_it_is_written(start: Start) -> None:
    def bound_to(side: Side) -> str:
        return str(side.transport._server._lanes._listener.getsockname()[0])

    assert bound_to(start(host="127.0.0.1")) == "127.0.0.1"
    assert bound_to(start(host="127.0.0.1", bind_address="127.0.0.2")) == "127.0.0.2"
    assert bound_to(start(host="")) == default_address() != "0.0.0.0"
    everywhere = start(host="", bind_address="0.0.0.0")
    assert bound_to(everywhere) == "0.0.0.0"
    assert everywhere.transport._endpoint.host == default_address()


@pytest.mark.parametrize("incarnation", ["", "x" * 64])
def test_an_incarnation_that_no_hello_can_carry_is_named(start: Start, incarnation: str) -> None:
    with pytest.raises(PathUnavailable, match="it must have 1 to 63 bytes"):
        start(incarnation=incarnation)
