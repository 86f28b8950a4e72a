"""What two RDMA transports say to each other over a control connection, and its framing.

    initiator                                  target
    Hello   ->                              <- Welcome
    Connect (an endpoint's queue pairs) ->  <- Accepted | Refused
    a WRITE_WITH_IMM on each of them    ~>  <- Proven, for each that arrived
    Disconnect ->
    WantKeys ->                             <- Keys
    Settle (after a write into a GPU's memory) ->  <- Settled

Each message is four bytes of length and msgpack. The end of the connection is the end of all
endpoints made over it.
"""

from __future__ import annotations

import socket
import struct
import threading
from typing import Annotated

import msgspec

from mooncake_engine.transport import sockets
from mooncake_engine.transport.rdma.keys import KeyRow
from mooncake_engine.transport.rdma.records import DeviceRecord

MAGIC = "mooncake-rdma"
VERSION = 1
_LENGTH = struct.Struct("<I")
#: A region split into 10000 registrations on 8 NICs takes 1 MiB.
_MAX_MESSAGE = 64 << 20
#: A peer that takes no bytes for so long is stopped; nothing that we say may wait longer for it.
_SEND_TIMEOUT_S = 10.0

Number = Annotated[int, msgspec.Meta(ge=0, lt=1 << 24)]


class QueueAddress(msgspec.Struct, frozen=True, array_like=True):
    """One queue pair: its number and the packet number that it sends first."""

    number: Number
    psn: Number


class Hello(msgspec.Struct, frozen=True, tag=True):
    """Asks for the engine that started as `incarnation`."""

    incarnation: str
    magic: str = MAGIC
    version: int = VERSION


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """Who is here; `refusal` is empty when requests may follow."""

    incarnation: str
    refusal: str = ""
    version: int = VERSION


class Connect(msgspec.Struct, frozen=True, tag=True):
    """Make an endpoint between the initiator's `nic` and the target's NIC named `target`."""

    token: int
    nic: DeviceRecord
    target: str
    queues: Annotated[tuple[QueueAddress, ...], msgspec.Meta(max_length=255)]
    mtu: Annotated[int, msgspec.Meta(ge=256, le=4096)]
    reads: int  # READs that each queue pair would have under way


class Accepted(msgspec.Struct, frozen=True, tag=True):
    """The target's queue pairs, ready to receive, in the order of `Connect.queues`."""

    token: int
    queues: tuple[QueueAddress, ...]
    mtu: int
    reads: int  # that each queue pair serves at once


class Refused(msgspec.Struct, frozen=True, tag=True):
    """No such endpoint, and why."""

    token: int
    reason: str


class Proven(msgspec.Struct, frozen=True, tag=True):
    """The WRITE_WITH_IMM of queue pair `queue` (its index) has arrived."""

    token: int
    queue: int


class Disconnect(msgspec.Struct, frozen=True, tag=True):
    """The initiator destroyed its queue pairs."""

    token: int


class WantKeys(msgspec.Struct, frozen=True, tag=True):
    """Ask for `Keys`: at first, and when an address or a key proves to be out of date."""


class Keys(msgspec.Struct, frozen=True, tag=True):
    """All registered memory: one key for each NIC of the sender, in the order of its record."""

    rows: tuple[KeyRow, ...]
    locations: tuple[str, ...]  # one for each row


class Settle(msgspec.Struct, frozen=True, tag=True):
    """We wrote into memory of these GPUs of yours: make it visible to them."""

    token: int
    gpus: tuple[int, ...]


class Settled(msgspec.Struct, frozen=True, tag=True):
    """Done; or why it could not be, and the bytes must not be used."""

    token: int
    error: str = ""


Message = (
    Hello
    | Welcome
    | Connect
    | Accepted
    | Refused
    | Proven
    | Disconnect
    | WantKeys
    | Keys
    | Settle
    | Settled
)
_decoder = msgspec.msgpack.Decoder(Message)


class Malformed(Exception):
    """The peer sent what this protocol does not know; its connection ends."""


class MessageStream:
    """Messages over one socket. One thread receives, any thread sends."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._sending = threading.Lock()
        sockets.set_timeout(sock, socket.SO_SNDTIMEO, _SEND_TIMEOUT_S)

    def send(self, message: Message) -> None:
        """Send one. Raises `OSError` when the connection broke or the peer takes nothing."""
        body = msgspec.msgpack.encode(message)
        with self._sending:
            self._socket.sendall(_LENGTH.pack(len(body)) + body)

    def set_patience(self, seconds: float | None) -> None:
        """Let `receive` fail after so long without a byte; None: it waits for as long as it takes.

        (A host that vanished is noticed by the socket's own keep-alive.)
        """
        if seconds is None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", 0, 0))
        else:
            sockets.set_timeout(self._socket, socket.SO_RCVTIMEO, seconds)

    def receive(self) -> Message:
        """Wait for one message.

        Raises:
            OSError | EOFError: The connection broke, ended, or nothing came in time.
            Malformed: Another protocol.
        """
        (size,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
        if not 0 < size <= _MAX_MESSAGE:
            raise Malformed(f"a message of {size} bytes; 1 to {_MAX_MESSAGE} are allowed")
        try:
            message: Message = _decoder.decode(self._exactly(size))
        except msgspec.MsgspecError as bad:
            raise Malformed(f"a message that cannot be read: {bad}") from bad
        return message

    def _exactly(self, size: int) -> bytearray:
        data = bytearray(size)
        view, filled = memoryview(data), 0
        while filled < size:
            count = self._socket.recv_into(view[filled:])
            if not count:
                raise EOFError("it closed the connection")
            filled += count
        return data

    def shutdown(self) -> None:
        """Make a blocked `receive` end, and tell the peer. Idempotent, any thread."""
        sockets.wake_accept(self._socket)

    def close(self) -> None:
        """After the receiving thread has ended. Idempotent."""
        self._socket.close()
