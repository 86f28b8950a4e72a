"""Stands between an initiator and a target's control port: passes messages on, alters them, cuts.

So a test makes a peer lie without touching either end. Requests themselves go from NIC to NIC.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import TYPE_CHECKING, Self

import msgspec
from mooncake_engine.transport.rdma.messages import Malformed, Message, MessageStream
from mooncake_engine.transport.rdma.records import RdmaEndpoint

if TYPE_CHECKING:
    from collections.abc import Callable

    from mooncake_engine.types import SegmentRecord

JOIN_S = 10.0


def endpoint_of(record: SegmentRecord) -> RdmaEndpoint:
    """What a record tells of its rdma transport."""
    return msgspec.msgpack.decode(record.endpoints["rdma"], type=RdmaEndpoint)


def _unaltered(message: Message) -> Message:
    return message


class ControlProxy:
    """A context manager; `record` leads initiators through it to the target.

    Attributes:
        to_target: Alters what initiators say. May be replaced at any time.
        to_initiator: Alters what the target says.
    """

    def __init__(self, record: SegmentRecord) -> None:
        self.to_target: Callable[[Message], Message] = _unaltered
        self.to_initiator: Callable[[Message], Message] = _unaltered
        self._target = endpoint_of(record)
        self._listener = socket.create_server(("127.0.0.1", 0))
        here = msgspec.structs.replace(
            self._target, host="127.0.0.1", port=self._listener.getsockname()[1]
        )
        self.record = msgspec.structs.replace(
            record, endpoints={"rdma": msgspec.Raw(msgspec.msgpack.encode(here))}
        )
        self._lock = threading.Lock()  # guards the two below
        self._streams: list[MessageStream] = []
        self._threads: list[threading.Thread] = []
        self._acceptor = threading.Thread(target=self._accept)

    def cut(self) -> None:
        """End every connection that goes through here; new ones are welcome."""
        with self._lock:
            for stream in self._streams:
                stream.shutdown()

    def __enter__(self) -> Self:
        self._acceptor.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join(JOIN_S)
        self.cut()
        for thread in (self._acceptor, *self._threads):
            thread.join(JOIN_S)
            assert not thread.is_alive(), f"{thread.name} did not end"
        for stream in self._streams:
            stream.close()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:  # shut down
                return
            there = socket.create_connection((self._target.host, self._target.port))
            initiator, target = MessageStream(sock), MessageStream(there)
            ways = (
                (initiator, target, lambda message: self.to_target(message)),
                (target, initiator, lambda message: self.to_initiator(message)),
            )
            with self._lock:
                self._streams += [initiator, target]
                for way in ways:
                    thread = threading.Thread(target=_pass_on, args=way)
                    self._threads.append(thread)
                    thread.start()


def _pass_on(
    source: MessageStream, sink: MessageStream, alter: Callable[[Message], Message]
) -> None:
    with contextlib.suppress(OSError, EOFError, Malformed):
        while True:
            sink.send(alter(source.receive()))
    for stream in (source, sink):  # the end of one is the end of the other
        stream.shutdown()
