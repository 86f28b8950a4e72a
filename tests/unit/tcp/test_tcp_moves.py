"""Bytes and statuses of a lane, both directions."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
from mooncake_engine.errors import LaneError, PathUnavailable
from mooncake_engine.transport.tcp import wire
from mooncake_engine.transport.tcp.stream import Stream
from mooncake_engine.types import Op, Status
from tcp_sides import OtherProcess, Side, port_of, record_of, scattered, slice_of, soon

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mooncake_engine.transport.base import Lane
    from mooncake_engine.types import SegmentRecord, Slice

    Start = Callable[..., Side]
    OpenLane = Callable[[Side, SegmentRecord], Lane]

MIB = 1 << 20


def failure_of(lane: Lane, piece: Slice, deadline: float) -> LaneError:
    with pytest.raises(LaneError) as caught:
        lane.move(piece, deadline)
    return caught.value


def collect_failure(caught: list[LaneError], lane: Lane, piece: Slice) -> None:
    caught.append(failure_of(lane, piece, soon(30)))


def whole_memory(op: Op, initiator: Side, target: Side) -> Slice:
    return slice_of(op, [initiator.address], [target.address], [initiator.memory.size])


@pytest.mark.parametrize("op", [Op.READ, Op.WRITE])
@pytest.mark.parametrize(
    ("size", "count", "longest"),
    [(MIB, 1, MIB), (MIB, 1, 1), (MIB, 1024, 1024), (64 * MIB, 1000, 16_384), (4096, 1024, 1)],
)
def test_scattered_runs_arrive_exactly_and_nothing_else_changes(
    start: Start, open_lane: OpenLane, op: Op, size: int, count: int, longest: int
) -> None:
    initiator, target = start(size=size), start(size=size)
    random = np.random.default_rng(size + count + longest)
    source, sink = (target, initiator) if op is Op.READ else (initiator, target)
    source.memory[:] = random.integers(1, 256, size, np.uint8)
    offsets, lengths = scattered(random, size, count, longest)
    into = np.flip(offsets)
    fits = np.flip(lengths)  # a run's place in the sink is the place of another run
    lengths = np.minimum(lengths, fits)
    expected = np.zeros(size, np.uint8)
    for start_at, end_at, length in zip(offsets, into, lengths, strict=True):
        expected[int(end_at) : int(end_at + length)] = source.memory[
            int(start_at) : int(start_at + length)
        ]
    lane = open_lane(initiator, target.record)
    here, there = (into, offsets) if op is Op.READ else (offsets, into)
    lane.move(slice_of(op, initiator.address + here, target.address + there, lengths), soon())
    assert np.array_equal(sink.memory, expected)


@pytest.mark.parametrize("op", [Op.READ, Op.WRITE])
def test_64_mib_in_slices_over_four_lanes_arrive_exactly(
    start: Start, open_lane: OpenLane, op: Op
) -> None:
    size, piece = 64 * MIB, 8 * MIB
    initiator, target = start(size=size), start(size=size)
    source, sink = (target, initiator) if op is Op.READ else (initiator, target)
    source.memory[:] = np.random.default_rng(1).integers(0, 256, size, np.uint8)
    pieces = [
        slice_of(op, [initiator.address + at], [target.address + at], [piece])
        for at in range(0, size, piece)
    ]

    def drive(lane: Lane, mine: list[Slice]) -> None:
        for one in mine:
            lane.move(one, soon())

    threads = [
        threading.Thread(
            target=drive, args=(open_lane(initiator, target.record), pieces[number::4])
        )
        for number in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert np.array_equal(source.memory, sink.memory)


@pytest.fixture
def alarms() -> Iterator[list[int]]:
    """Signals that interrupt the main thread's system calls all the time."""
    rang: list[int] = []
    old = signal.signal(signal.SIGALRM, lambda number, _: rang.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    yield rang
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, old)


@pytest.mark.parametrize("op", [Op.READ, Op.WRITE])
def test_partial_counts_and_interrupted_calls_lose_no_byte(
    start: Start, open_lane: OpenLane, alarms: list[int], op: Op
) -> None:
    size = 64 * MIB
    initiator, target = start(size=size), start(size=size)
    # Small buffers make every call wait, so that the alarms meet it half done.
    listener = target.transport._server._lanes._listener
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 17)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 17)
    source, sink = (target, initiator) if op is Op.READ else (initiator, target)
    source.memory[:] = np.random.default_rng(2).integers(0, 256, size, np.uint8)
    lane = open_lane(initiator, target.record)
    alarms.clear()
    at = np.arange(0, size, size // 1024, dtype=np.uint64)
    piece = slice_of(op, initiator.address + at, target.address + at, [size // 1024] * 1024)
    lane.move(piece, soon(30))
    while len(alarms) <= 10:  # a busy machine merges alarms that are due together
        sink.memory[:] = 0
        lane.move(piece, soon(30))
    assert np.array_equal(source.memory, sink.memory)


@pytest.mark.parametrize("op", [Op.READ, Op.WRITE])
@pytest.mark.parametrize(
    ("first", "length"), [(-1, 10), (MIB - 9, 10), (MIB, 1), (1 << 40, 5 * MIB)]
)
def test_an_address_outside_the_regions_is_refused_and_the_lane_lives_on(
    start: Start, open_lane: OpenLane, op: Op, first: int, length: int
) -> None:
    initiator, target = start(size=8 * MIB), start(size=MIB)
    lane = open_lane(initiator, target.record)
    bad = slice_of(op, [initiator.address], [target.address + first], [length])
    refusal = failure_of(lane, bad, soon())
    assert refusal.status is Status.REFUSED
    assert "lie outside every region" in str(refusal)
    if length < MIB:  # else several connections share it, and any of them may be refused first
        assert f"{target.address + first:#x} lie" in str(refusal)
    assert not target.memory.any()
    (initiator if op is Op.WRITE else target).memory[:MIB] = 5
    lane.move(slice_of(op, [initiator.address], [target.address], [MIB]), soon())
    assert (initiator.memory[:MIB] == 5).all()
    assert (target.memory == 5).all()


@pytest.mark.parametrize("op", [Op.READ, Op.WRITE])
def test_a_grant_opens_the_memory_until_it_is_revoked(
    start: Start, open_lane: OpenLane, op: Op
) -> None:
    initiator, target = start(), start()
    lane = open_lane(initiator, target.record)
    piece = slice_of(op, [initiator.address], [target.address], [100], b"room 7")
    assert failure_of(lane, piece, soon()).status is Status.REFUSED
    target.grants.add(b"room 7")
    lane.move(piece, soon())
    target.grants.revoke(b"room 7")
    refusal = failure_of(lane, piece, soon())
    assert refusal.status is Status.REFUSED
    assert b"room 7".hex() in str(refusal)


@pytest.mark.parametrize("loops", ["C", "Python"], indirect=True)  # one connection
def test_a_slice_that_no_frame_can_carry_is_refused_here(start: Start, open_lane: OpenLane) -> None:
    initiator, target = start(), start()
    lane = open_lane(initiator, target.record)
    runs = [target.address] * 1025
    many = slice_of(Op.READ, runs, runs, [1] * 1025)
    assert "at most 1024 runs" in str(failure_of(lane, many, soon()))
    long = slice_of(Op.READ, [1], [1], [1], b"x" * 1025)
    assert "at most 1024 bytes, not 1025" in str(failure_of(lane, long, soon()))
    lane.move(whole_memory(Op.READ, initiator, target), soon())


@pytest.mark.parametrize("op", [Op.READ, Op.WRITE])
def test_a_killed_peer_ends_the_move_with_peer_gone(
    start: Start, open_lane: OpenLane, other_process: OtherProcess, op: Op
) -> None:
    initiator = start()
    record = other_process.record
    lane = open_lane(initiator, record)
    # The same MiB again and again: 1 GiB under way without 1 GiB of memory.
    region = record.regions[0]
    piece = slice_of(
        op, [initiator.address] * 1024, [region.address] * 1024, [initiator.memory.size] * 1024
    )
    caught: list[LaneError] = []
    moving = threading.Event()

    def move_on() -> None:
        moving.set()
        try:
            while True:
                lane.move(piece, soon(30))
        except LaneError as error:
            caught.append(error)

    thread = threading.Thread(target=move_on)
    thread.start()
    assert moving.wait(10)
    os.kill(other_process.pid, signal.SIGKILL)
    thread.join(10)
    assert [error.status for error in caught] == [Status.PEER_GONE]
    assert f"127.0.0.1:{port_of(record)}" in str(caught[0])
    assert f"{op} of 1073741824 bytes in 1024 runs over tcp with peer" in str(caught[0])
    with pytest.raises(PathUnavailable, match="Connection refused"):
        initiator.transport.connect(record)


@pytest.mark.parametrize("op", [Op.READ, Op.WRITE])
def test_a_stopped_peer_ends_the_move_at_its_deadline_and_spends_the_lane(
    start: Start, open_lane: OpenLane, other_process: OtherProcess, op: Op
) -> None:
    initiator = start()
    lane = open_lane(initiator, other_process.record)
    other_process.stop()
    address = other_process.record.regions[0].address
    # 1 GiB, so that a write cannot hide in the sockets' buffers.
    piece = slice_of(
        op, [initiator.address] * 1024, [address] * 1024, [initiator.memory.size] * 1024
    )
    began = time.monotonic()
    assert failure_of(lane, piece, began + 0.3).status is Status.TIMED_OUT
    assert 0.3 <= time.monotonic() - began < 5
    os.kill(other_process.pid, signal.SIGCONT)
    after = failure_of(lane, piece, soon())
    assert after.status is Status.FAILED
    assert "this lane ended before" in str(after)
    assert not initiator.memory.any()  # the late answer found no lane


def test_a_deadline_that_passed_before_the_move_leaves_the_lane_good(
    start: Start, open_lane: OpenLane
) -> None:
    initiator, target = start(), start()
    lane = open_lane(initiator, target.record)
    piece = whole_memory(Op.READ, initiator, target)
    assert failure_of(lane, piece, time.monotonic()).status is Status.TIMED_OUT
    lane.move(piece, soon())


def test_an_interrupt_ends_a_blocked_move_within_100_ms(
    start: Start, open_lane: OpenLane, other_process: OtherProcess
) -> None:
    initiator = start()
    lanes = [open_lane(initiator, other_process.record) for _ in range(3)]
    other_process.stop()
    piece = slice_of(
        Op.READ, [initiator.address], [other_process.record.regions[0].address], [1000]
    )
    took = []
    for lane in lanes:
        caught: list[LaneError] = []
        thread = threading.Thread(target=collect_failure, args=(caught, lane, piece))
        thread.start()
        thread.join(0.05)  # lets it block; an interrupt that comes earlier must work as well
        began = time.monotonic()
        lane.interrupt()
        thread.join(10)
        took.append(time.monotonic() - began)
        assert [error.status for error in caught] == [Status.CANCELLED]
    assert min(took) < 0.1  # the best of three: other programs use this machine too


def test_an_interrupted_lane_moves_nothing_more(start: Start, open_lane: OpenLane) -> None:
    initiator, target = start(), start()
    lane = open_lane(initiator, target.record)
    lane.interrupt()
    lane.interrupt()
    piece = whole_memory(Op.READ, initiator, target)
    assert failure_of(lane, piece, soon()).status is Status.CANCELLED


def test_local_memory_that_is_not_mapped_fails_the_slice_only(
    start: Start, open_lane: OpenLane
) -> None:
    initiator, target = start(), start()
    lane = open_lane(initiator, target.record)
    failure = failure_of(lane, slice_of(Op.READ, [4096], [target.address], [100]), soon())
    assert failure.status is Status.FAILED
    assert "local memory is not mapped" in str(failure)
    open_lane(initiator, target.record).move(whole_memory(Op.READ, initiator, target), soon())


def test_ipv6_carries_a_move(start: Start, open_lane: OpenLane) -> None:
    initiator, target = start(host="::1"), start(host="::1")
    target.memory[:] = 9
    open_lane(initiator, target.record).move(whole_memory(Op.READ, initiator, target), soon())
    assert (initiator.memory == 9).all()


def test_a_peer_that_restarted_on_the_same_port_is_found_out(start: Start) -> None:
    initiator, old = start(), start(incarnation="old")
    record = old.record
    old.transport.close()
    start(incarnation="new", min_port=old.port, max_port=old.port)
    with pytest.raises(PathUnavailable, match="is incarnation new now, not old"):
        initiator.transport.connect(record)


def test_an_answer_that_is_no_answer_fails_the_slice(start: Start, open_lane: OpenLane) -> None:
    initiator = start()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def misbehave() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.recv(wire.HELLO.size, socket.MSG_WAITALL)
                sock.sendall(wire.pack_welcome(wire.Verdict.WELCOME, "first"))
                sock.recv(wire.REQUEST.size + 16, socket.MSG_WAITALL)
                sock.sendall(wire.pack_answer(Status.OK, 12345))

        thread = threading.Thread(target=misbehave)
        thread.start()
        lane = open_lane(initiator, record_of("127.0.0.1", listener.getsockname()[1]))
        failure = failure_of(lane, slice_of(Op.READ, [initiator.address], [1], [8]), soon())
        thread.join(10)
    assert failure.status is Status.FAILED
    assert "the answer to request 1 was for 12345" in str(failure)


def test_a_port_where_nobody_greets_is_given_up_after_the_connect_timeout(start: Start) -> None:
    initiator = start()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        began = time.monotonic()
        with pytest.raises(PathUnavailable, match="said nothing for 1 s"):
            initiator.transport.connect(record_of("127.0.0.1", listener.getsockname()[1]))
    assert 1 <= time.monotonic() - began < 5


@pytest.mark.parametrize("endpoint", [("no\0host", 80), ("x" * 300, 80), ("127.0.0.1", 70000)])
def test_an_endpoint_that_is_none_makes_the_path_unavailable(
    start: Start, endpoint: tuple[str, int]
) -> None:
    with pytest.raises(PathUnavailable):
        start().transport.connect(record_of(*endpoint))


def test_a_peer_without_a_tcp_endpoint_is_named(start: Start) -> None:
    record = record_of("127.0.0.1", 1)
    record.endpoints.clear()
    with pytest.raises(PathUnavailable, match="peer published no tcp endpoint"):
        start().transport.connect(record)


def test_a_connection_that_stays_on_this_machine_has_small_buffers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = Stream(socket.create_connection(listener.getsockname()))
        far = Stream(
            socket.create_connection(listener.getsockname(), source_address=("127.0.0.2", 0))
        )
    kernels_own = far._socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    # The kernel doubles what is asked for, and may be told to give less.
    asked = near._socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    near.close()
    far.close()
    assert asked != kernels_own
    assert asked <= 2 * 256 << 10
