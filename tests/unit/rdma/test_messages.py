"""Messages over a socket: whole ones, halves, too long ones, and those of several threads."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING

import msgspec
import pytest
from mooncake_engine.transport.rdma.keys import KeyRow
from mooncake_engine.transport.rdma.messages import (
    Accepted,
    Connect,
    Disconnect,
    Hello,
    Keys,
    Malformed,
    Message,
    MessageStream,
    Proven,
    QueueAddress,
    Refused,
    WantKeys,
    Welcome,
)
from mooncake_engine.transport.rdma.records import DeviceRecord

if TYPE_CHECKING:
    from collections.abc import Iterator

NIC = DeviceRecord(
    name="mlx5_0",
    port=1,
    lid=0,
    gid=bytes(16),
    gid_kind="roce_v2",
    link_layer="ethernet",
    active_mtu=4096,
    numa_node=-1,
    can_read=True,
    max_dest_rd_atomic=16,
)
QUEUES = (QueueAddress(1, 0), QueueAddress((1 << 24) - 1, (1 << 24) - 1))
ALL: list[Message] = [
    Hello("this start"),
    Welcome("this start"),
    Welcome("another", "it was restarted"),
    Connect(1 << 31, NIC, "mlx5_1", QUEUES, 4096, 16),
    Accepted(7, QUEUES, 1024, 1),
    Refused(7, "no such NIC"),
    Proven(7, 1),
    Disconnect(7),
    WantKeys(),
    Keys((KeyRow((1 << 64) - 8192, 4096, (1, (1 << 32) - 1)),), ("cuda:7",)),
    Keys((), ()),
]


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, MessageStream]]:
    """A bare socket and a stream, joined."""
    here, there = socket.socketpair()
    with contextlib.closing(here), contextlib.closing(MessageStream(there)) as stream:
        yield here, stream


def _framed(body: bytes) -> bytes:
    return struct.pack("<I", len(body)) + body


@pytest.mark.parametrize("message", ALL, ids=lambda message: repr(message)[:40])
def test_a_message_arrives_as_it_was_sent(
    ends: tuple[socket.socket, MessageStream], message: Message
) -> None:
    here, stream = ends
    MessageStream(here).send(message)
    MessageStream(here).send(message)
    assert stream.receive() == message
    assert stream.receive() == message


def test_a_message_may_come_byte_by_byte(ends: tuple[socket.socket, MessageStream]) -> None:
    here, stream = ends
    sent = _framed(msgspec.msgpack.encode(ALL[3]))

    def dribble() -> None:
        for number in range(len(sent)):
            here.sendall(sent[number : number + 1])

    sender = threading.Thread(target=dribble)
    sender.start()
    assert stream.receive() == ALL[3]
    sender.join()


@pytest.mark.parametrize("cut", [0, 1, 4, 5, -1])
def test_an_end_in_the_middle_is_an_end(
    ends: tuple[socket.socket, MessageStream], cut: int
) -> None:
    here, stream = ends
    here.sendall(_framed(msgspec.msgpack.encode(ALL[0]))[:cut])
    here.shutdown(socket.SHUT_WR)
    with pytest.raises(EOFError, match="closed"):
        stream.receive()


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (struct.pack("<I", 0), "0 bytes"),
        (struct.pack("<I", (64 << 20) + 1), "67108865 bytes"),
        (b"GET / HTTP/1.1\r\n\r\n", "542393671 bytes"),  # "GET "
        (_framed(b"\xc1"), "cannot be read"),
        (_framed(msgspec.msgpack.encode({"type": "Goodbye"})), "cannot be read"),
        (_framed(msgspec.msgpack.encode({"type": "Proven", "token": 1})), "cannot be read"),
        (_framed(msgspec.msgpack.encode(Accepted(1, (QueueAddress(1 << 24, 0),), 1, 1))), "read"),
        (_framed(msgspec.msgpack.encode(WantKeys()) + b"more"), "cannot be read"),
    ],
)
def test_another_protocol_is_not_understood(
    ends: tuple[socket.socket, MessageStream], sent: bytes, why: str
) -> None:
    here, stream = ends
    here.sendall(sent)
    with pytest.raises(Malformed, match=why):
        stream.receive()


def test_patience_ends_and_may_be_given_back(ends: tuple[socket.socket, MessageStream]) -> None:
    here, stream = ends
    stream.set_patience(0.05)
    with pytest.raises(BlockingIOError):
        stream.receive()
    stream.set_patience(None)
    later = threading.Timer(0.1, MessageStream(here).send, [WantKeys()])
    later.start()
    assert stream.receive() == WantKeys()
    later.join()


def test_messages_of_several_threads_do_not_mix(
    ends: tuple[socket.socket, MessageStream],
) -> None:
    here, stream = ends
    sending = MessageStream(here)
    threads, each = 4, 200

    def send(number: int) -> None:
        for step in range(each):
            sending.send(Refused(number, "x" * (step * 7)))

    senders = [threading.Thread(target=send, args=(number,)) for number in range(threads)]
    for sender in senders:
        sender.start()
    steps = [0] * threads
    for _ in range(threads * each):
        message = stream.receive()
        assert isinstance(message, Refused)
        assert message.reason == "x" * (steps[message.token] * 7)
        steps[message.token] += 1
    for sender in senders:
        sender.join()


def test_a_shutdown_ends_a_receive_that_waits(ends: tuple[socket.socket, MessageStream]) -> None:
    _, stream = ends
    failures: list[BaseException] = []

    def receive() -> None:
        try:
            stream.receive()
        except (EOFError, OSError) as failure:
            failures.append(failure)

    receiver = threading.Thread(target=receive)
    receiver.start()
    time.sleep(0.01)  # most likely it waits by now; if not, it must end all the same
    stream.shutdown()
    stream.shutdown()
    receiver.join(30)
    assert not receiver.is_alive()
    assert len(failures) == 1
