"""The loops in C beside their Python twins: both judge a frame alike."""

from __future__ import annotations

import contextlib
import logging
import socket
from typing import TYPE_CHECKING

import numpy as np
import pytest
from mooncake_engine import native
from mooncake_engine.native.ledgers import RegionLedger
from mooncake_engine.transport.tcp import wire
from mooncake_engine.transport.tcp.exchange import NativeExchange, PythonExchange
from mooncake_engine.transport.tcp.wide import WideExchange
from mooncake_engine.types import Op, Region
from native_loops import needs_native
from tcp_sides import Side, greeted_socket, received_until_the_end, slice_of, soon

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from mooncake_engine.transport.base import Lane
    from mooncake_engine.types import SegmentRecord

    Start = Callable[..., Side]
    OpenLane = Callable[[Side, SegmentRecord], Lane]

MIB = 1 << 20


def test_each_loop_is_used_where_it_is_asked_for(
    start: Start, open_lane: OpenLane, loops: str
) -> None:
    initiator, target = start(), start()
    exchange = open_lane(initiator, target.record)._exchange  # type: ignore[attr-defined] - a TcpLane
    kinds = {"C": NativeExchange, "Python": PythonExchange}
    assert isinstance(exchange, kinds.get(loops, WideExchange))
    assert (target.transport._server._ledgers is not None) == (loops != "Python")


def test_without_the_library_bytes_move_and_the_log_says_why_they_are_slow(
    start: Start,
    open_lane: OpenLane,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(native, "_FILE", tmp_path / "missing.so")
    native._loaded.cache_clear()
    try:
        with caplog.at_level(logging.INFO):
            initiator, target = start(native=True), start(native=True)
    finally:
        native._loaded.cache_clear()
    assert "install a C compiler" in caplog.text
    target.memory[:] = 5
    piece = slice_of(Op.READ, [initiator.address], [target.address], [MIB])
    open_lane(initiator, target.record).move(piece, soon())
    assert (initiator.memory == 5).all()


def test_a_library_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_native()
    monkeypatch.setattr(native, "ABI", native.ABI + 1)
    with pytest.raises(native.Unavailable, match="install this package again"):
        native.Library(native._FILE)


@pytest.fixture
def both() -> Iterator[list[Side]]:
    """A target served by C and one served by Python; their memory holds the same."""
    needs_native()
    with contextlib.ExitStack() as closing:
        sides = [Side(size=4096, native=loops) for loops in (True, False)]
        for side in sides:
            closing.callback(side.transport.close)
            side.memory[:] = np.arange(4096) % 251
            side.grants.add(b"room")
        yield sides


def answer_to(side: Side, frame: bytes) -> tuple[bytes, bytes]:
    """All that the target says to one frame and no more, and its memory after that."""
    with greeted_socket(side.port) as peer:
        with contextlib.suppress(OSError):  # it may have closed at the first wrong byte
            peer.sendall(frame)
            peer.shutdown(socket.SHUT_WR)
        return received_until_the_end(peer), side.memory.tobytes()


def frame_for(side: Side, op: Op) -> bytes:
    starts = [side.address + 100, side.address + 1000]
    head = wire.pack_request(slice_of(op, [1, 1], starts, [7, 30], b"room"), 1)
    return head + (b"\x55" * 37 if op is Op.WRITE else b"")


@pytest.mark.parametrize("op", [Op.READ, Op.WRITE])
def test_c_and_python_answer_a_frame_alike_whichever_byte_of_it_is_wrong(
    both: list[Side], op: Op
) -> None:
    asked = len(frame_for(both[0], op)) - (37 if op is Op.WRITE else 0)
    # An address with another low byte may lie in one side's memory and not in the other's.
    low = {24 + run * 8 + byte for run in range(2) for byte in range(6)}
    answers = set()
    for place in sorted(set(range(asked)) - low):
        for change in (1, 0x80, 0xFF):
            said = []
            for side in both:
                frame = bytearray(frame_for(side, op))
                frame[place] ^= change
                said.append(answer_to(side, bytes(frame)))
            assert said[0][1] == said[1][1], f"byte {place} ^ {change:#x}: the memory differs"
            assert said[0][0][:16] == said[1][0][:16], f"byte {place} ^ {change:#x}"
            answers.add(said[0][0][:1])
    assert answers == {b"", b"\0", b"\1"}  # closed, served, refused


@pytest.mark.parametrize("op", [Op.READ, Op.WRITE])
def test_a_frame_that_stops_at_any_byte_moves_nothing(both: list[Side], op: Op) -> None:
    whole = len(frame_for(both[0], op)) - (37 if op is Op.WRITE else 0)
    for stop in range(whole):
        for side in both:
            before = side.memory.tobytes()
            assert answer_to(side, frame_for(side, op)[:stop]) == (b"", before)


def test_a_ledger_that_joins_late_knows_what_the_table_knows(start: Start) -> None:
    needs_native()
    target = start()
    handed: list[list[int]] = []

    class Watching(RegionLedger):
        def replace(self, starts: object, ends: object, gone: tuple[int, int] = (0, 0)) -> None:
            handed.append([*np.asarray(starts).tolist(), *np.asarray(ends).tolist(), *gone])

    target.regions.follow(Watching(native.library()))
    more = np.zeros(100, np.uint8)
    first = [target.address, target.address + MIB]
    at = int(more.__array_interface__["data"][0])
    target.regions.add(Region(at, 100, "cpu", more))
    target.regions.remove(at)
    assert handed[0] == [*first, 0, 0]
    assert sorted(handed[1][:4]) == sorted([*first, at, at + 100])
    assert handed[2] == [*first, at, at + 100]


def test_a_run_that_spans_two_touching_regions_is_served(start: Start, open_lane: OpenLane) -> None:
    initiator, target = start(), start()
    target.regions.remove(target.address)
    for part in range(2):
        at = target.address + part * 1000
        target.regions.add(Region(at, 1000, "cpu", target.memory))
    target.memory[:] = 3
    lane = open_lane(initiator, target.record)
    lane.move(slice_of(Op.READ, [initiator.address], [target.address], [2000]), soon())
    assert (initiator.memory[:2000] == 3).all()
    assert not initiator.memory[2000:].any()
