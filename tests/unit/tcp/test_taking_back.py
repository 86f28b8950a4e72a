"""Memory and grants taken back under load: afterwards no peer reads or writes a byte of it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
from mooncake_engine.transport.tcp import wire
from mooncake_engine.types import Op, Region
from tcp_sides import Side, greeted_socket, slice_of, until

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from typing import Self

    Start = Callable[..., Side]

MIB = 1 << 20
SIZE = 4 * MIB
ROUNDS = 50
LATE = 0xEE  # what memory holds once its owner has it back
# A sender that does not stop in time is done with its last 64 KiB in 10 us: a byte in each so many,
# written in 1 us, meets it; all of them, in 100, do not.
STRIDE = 1024


def received(peer: socket.socket, size: int) -> bytes:
    """So many bytes, or fewer when the other side closed first."""
    parts = []
    while size and (part := peer.recv(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


class Crowd:
    """Peers that read or write all memory again and again, whatever becomes of their lanes."""

    def __init__(self, side: Side, op: Op, grant: Callable[[], bytes] = bytes) -> None:
        self._side = side
        self._op = op
        self._grant = grant
        self._stop = threading.Event()
        self.served = 0  # slices; two threads add to it, so it may be less
        self.saw_late = False
        self.waited_in_vain = False
        self._threads = [threading.Thread(target=self._run) for _ in range(2)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(20)

    def wait_for_one(self) -> None:
        """Until one more slice was served whole; then the next one is under way."""
        before = self.served
        until(lambda: self.served != before, "a served slice")

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                with greeted_socket(self._side.port) as peer:
                    while not self._stop.is_set() and self._one(peer):
                        pass
            except TimeoutError:  # 10 s: its lane was ended and it was not told
                self.waited_in_vain = True
            except OSError:
                pass

    def _one(self, peer: socket.socket) -> bool:
        halves = [self._side.address, self._side.address + SIZE // 2]
        piece = slice_of(self._op, halves, halves, [SIZE // 2] * 2, self._grant())
        peer.sendall(wire.pack_request(piece, 1))
        if self._op is Op.WRITE:
            peer.sendall(b"\1" * SIZE)
        head = received(peer, wire.ANSWER.size)
        if len(head) < wire.ANSWER.size:
            return False
        status, reason_size, _ = wire.ANSWER.unpack(head)
        if status:
            return len(received(peer, reason_size)) == reason_size
        body = received(peer, SIZE if self._op is Op.READ else 0)
        self.saw_late |= LATE in body
        self.served += 1
        return True


def is_the_owners_alone(target: Side, op: Op) -> bool:
    """False: a byte was written that the owner did not write. What is read, the crowd sees."""
    if op is Op.READ:
        target.memory[::STRIDE] = LATE
        target.memory[:] = 1
        return True
    target.memory[:] = LATE
    return bool((target.memory == LATE).all())


@pytest.mark.parametrize("op", [Op.READ, Op.WRITE])
def test_memory_that_was_taken_back_is_the_owners_alone(start: Start, op: Op) -> None:
    target = start(size=SIZE)
    region = Region(target.address, SIZE, "cpu", target.memory)
    with Crowd(target, op) as crowd:
        for _ in range(ROUNDS):
            crowd.wait_for_one()
            target.regions.remove(target.address)
            assert is_the_owners_alone(target, op)
            target.regions.add(region)
    assert not crowd.saw_late
    assert not crowd.waited_in_vain


@pytest.mark.parametrize("op", [Op.READ, Op.WRITE])
def test_memory_whose_grant_has_ended_is_the_owners_alone(start: Start, op: Op) -> None:
    target = start(size=SIZE)
    grant = [b"first"]
    with Crowd(target, op, lambda: grant[0]) as crowd:
        for number in range(ROUNDS):
            grant[0] = b"round %d" % number
            target.grants.add(grant[0])
            crowd.wait_for_one()
            target.grants.revoke(grant[0])
            assert is_the_owners_alone(target, op)
    assert not crowd.saw_late
    assert not crowd.waited_in_vain
