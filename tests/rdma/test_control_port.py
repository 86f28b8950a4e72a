"""Who else connects to the control port: strangers, other versions, those that talk nonsense."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from typing import Any

import msgspec
import pytest
from control_proxy import endpoint_of
from mooncake_engine.transport.rdma import messages
from mooncake_engine.transport.rdma.messages import (
    Connect,
    Hello,
    MessageStream,
    QueueAddress,
    WantKeys,
    Welcome,
)
from rdma_ends import LIMIT_S, Pair, until
from rdma_stage import THEIRS

_HELLO = msgspec.msgpack.encode(Hello("nobody"))


def _framed(body: bytes) -> bytes:
    return struct.pack("<I", len(body)) + body


GARBAGE = {
    "another protocol": b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
    "a huge length": struct.pack("<I", 0xFFFF_FFFF),
    "nothing in it": struct.pack("<I", 0),
    "not msgpack": _framed(b"\xc1" * 64),
    "no greeting": _framed(msgspec.msgpack.encode(WantKeys())),
    "another magic": _framed(msgspec.msgpack.encode(Hello("nobody", magic="mooncake-tcp"))),
}


@pytest.mark.parametrize("sent", GARBAGE.values(), ids=GARBAGE)
def test_garbage_on_the_control_port_ends_its_connection_with_one_line(
    pair: Pair, caplog: pytest.LogCaptureFixture, sent: bytes
) -> None:
    at = endpoint_of(pair.theirs.record)
    with socket.create_connection((at.host, at.port), LIMIT_S) as sock:
        sock.sendall(sent)
        with contextlib.suppress(ConnectionResetError):  # it did not read all of it
            assert sock.recv(1) == b""
        port = sock.getsockname()[1]

    def lines() -> list[str]:
        return [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]

    until("it says so", lines)
    assert len(lines()) == 1
    assert f"127.0.0.1:{port}" in lines()[0]


@pytest.mark.parametrize("greeted", [False, True])
def test_half_a_message_is_waited_for_and_its_end_is_noticed(pair: Pair, *, greeted: bool) -> None:
    at = endpoint_of(pair.theirs.record)
    threads = threading.active_count()
    with socket.create_connection((at.host, at.port), LIMIT_S) as sock:
        if greeted:
            _greet(sock, pair)
        sock.sendall(_framed(_HELLO)[:-3])
        until("its thread runs", lambda: threading.active_count() == threads + 1)
    until("its thread has ended", lambda: threading.active_count() == threads)


def _greet(sock: socket.socket, pair: Pair) -> MessageStream:
    stream = MessageStream(sock)
    stream.send(Hello(pair.theirs.engine.incarnation))
    assert stream.receive() == Welcome(pair.theirs.engine.incarnation)
    return stream


@pytest.mark.parametrize(
    ("hello", "reason"),
    [
        (Hello("of long ago"), "restarted"),
        (Hello("", version=messages.VERSION + 1), "version"),
    ],
)
def test_who_asks_for_another_engine_or_speaks_another_version_is_told_why(
    pair: Pair, hello: Hello, reason: str
) -> None:
    at = endpoint_of(pair.theirs.record)
    with socket.create_connection((at.host, at.port), LIMIT_S) as sock:
        stream = MessageStream(sock)
        stream.send(hello)
        answer = stream.receive()
        assert isinstance(answer, Welcome)
        assert reason in answer.refusal
        with pytest.raises(EOFError):
            stream.receive()


@pytest.mark.parametrize(
    "nonsense",
    [
        {"target": "no such NIC"},
        {"mtu": 77},
        {"mtu": -1},
        {"reads": 1 << 40},
        {"queues": (QueueAddress(7, 0),) * 40_000},
    ],
    ids=["no such NIC", "odd MTU", "no MTU", "many READs", "many queue pairs"],
)
def test_a_wish_for_queue_pairs_that_cannot_be_is_refused(
    pair: Pair, nonsense: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    at = endpoint_of(pair.theirs.record)
    wish = Connect(5, endpoint_of(pair.ours.record).devices[0], THEIRS[0], (), 4096, 16)
    wish = msgspec.structs.replace(wish, queues=(QueueAddress(7, 0),))
    with socket.create_connection((at.host, at.port), LIMIT_S) as sock:
        stream = _greet(sock, pair)
        stream.send(msgspec.structs.replace(wish, **nonsense))
        with contextlib.suppress(EOFError, ConnectionResetError):  # or its connection ends
            assert isinstance(stream.receive(), messages.Refused | messages.Accepted)
    until("its queue pairs are gone", lambda: pair.counts() == pair.at_rest)
    assert not [r for r in caplog.records if r.levelname == "ERROR"]
