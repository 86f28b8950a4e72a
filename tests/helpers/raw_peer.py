"""Peers made of a bare socket, for what no node of ours would ever send, or never say."""

from __future__ import annotations

import socket
import struct
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Self, TypeVar

import msgspec
from node_stage import SOON

from mooncake_connector import wire
from mooncake_connector.control import split_address
from mooncake_connector.peers import PeerRef

if TYPE_CHECKING:
    from node_stage import Rank

M = TypeVar("M", bound=wire.Message)


class RawPeer:
    """One connection. Says what it is told to, and no Ping by itself."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.reader = ""  # of the last Subscribe that it received
        self._heard: deque[wire.AnyMessage] = deque()  # and `receive` has not given out
        sock.settimeout(SOON)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.socket.close()

    def send(self, *messages: wire.Message) -> None:
        """Say these; answers that name no reader are to the one who subscribed last."""
        addressed = []
        for message in messages:
            if isinstance(message, wire.Ready | wire.Gone) and not message.reader:
                while not self.reader:
                    self._heard.append(self._next())
                message = msgspec.structs.replace(message, reader=self.reader)
            addressed.append(message)
        self.socket.sendall(b"".join(map(wire.encode, addressed)))

    def receive(self, kind: type[M]) -> M:
        """The next message but pings; it has to be of this kind."""
        message = self._heard.popleft() if self._heard else self._next()
        assert isinstance(message, kind), f"{message} instead of {kind.__name__}"
        return message

    def _next(self) -> wire.AnyMessage:
        end = time.monotonic() + SOON  # of all: pings alone would keep a socket's time-out away
        while time.monotonic() < end:
            length = int.from_bytes(self._exactly(wire.PREFIX_BYTES), "big")
            message = wire.decode(self._exactly(length))
            if isinstance(message, wire.Subscribe):
                self.reader = message.reader
            if not isinstance(message, wire.Ping):
                return message
        raise TimeoutError(f"nothing but pings for {SOON:g} s")

    def is_closed(self) -> bool:
        """Wait until the other side hangs up, whatever it says before; False when it does not."""
        end = time.monotonic() + SOON
        try:
            while self.socket.recv(65536):
                if time.monotonic() >= end:
                    return False
        except ConnectionError:
            return True
        except TimeoutError:
            return False
        return True

    def reset(self) -> None:
        """Die as a killed process with unread data does: the peer gets a reset."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.socket.recv(count - len(data))
            if not more:
                raise ConnectionResetError("closed in the middle of a message")
            data += more
        return data


def connect(prefill: Rank) -> RawPeer:
    """A connection to prefill's control endpoint, nothing said yet."""
    return RawPeer(socket.create_connection(split_address(prefill.node.address), SOON))


def hello(prefill: Rank, **fields: object) -> wire.Hello:
    """What a decode node with the same kind of cache says first."""
    like = wire.Hello(
        version=wire.VERSION,
        engine_id="raw",
        rank=prefill.node.rank,
        incarnation="raw",
        expects="",
        spec=prefill.spec,
        heartbeat_s=0.1,
    )
    return msgspec.structs.replace(like, **fields)


def join(prefill: Rank) -> RawPeer:
    """A decode node that was welcomed."""
    peer = connect(prefill)
    peer.send(hello(prefill))
    peer.receive(wire.Welcome)
    return peer


def subscribe(transfer: str = "t", **fields: object) -> wire.Subscribe:
    like = wire.Subscribe(
        transfer_id=transfer,
        reader="raw",
        readers=1,
        first=(0,),
        tokens=8,
        prompt_key="key",
        remaining_s=60.0,
    )
    return msgspec.structs.replace(like, **fields)


def release(attempt: int, transfer: str = "t", **fields: object) -> wire.Release:
    like = wire.Release(transfer_id=transfer, attempt=attempt, reader="raw", ok=True)
    return msgspec.structs.replace(like, **fields)


class RawPrefill:
    """A control endpoint that answers what it is told to; one connection at a time."""

    def __init__(self, like: Rank) -> None:
        """`like` lends its cache, layout and segment to the welcome."""
        self.like = like
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(SOON)
        port = self._listener.getsockname()[1]
        self.ref = PeerRef(address=f"127.0.0.1:{port}", engine_id="raw")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._listener.close()

    def accept(self) -> RawPeer:
        """The next connection, its Hello not read yet."""
        return RawPeer(self._listener.accept()[0])

    def welcome(self, **fields: Any) -> wire.Welcome:  # noqa: ANN401 - any field's
        like = wire.Welcome(
            version=wire.VERSION,
            engine_id="raw",
            rank=0,
            incarnation="raw",
            spec=self.like.spec,
            layout=self.like.layout,
            segment=self.like.engine.record(),
            heartbeat_s=0.1,
        )
        return msgspec.structs.replace(like, **fields)

    def join(self) -> RawPeer:
        """A decode node connected and was welcomed."""
        peer = self.accept()
        peer.receive(wire.Hello)
        peer.send(self.welcome())
        return peer
