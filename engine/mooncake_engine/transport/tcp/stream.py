"""One blocking socket that moves iovecs whole: partial counts, time-outs and the end of stream."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from mooncake_engine.iovec import IOVEC, Message, address_of, advance
from mooncake_engine.transport import sockets

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from mooncake_engine.iovec import Iovecs
    from mooncake_engine.types import Uint64s

TICK_S = 1.0  # the socket's own time-out while a far deadline runs: one setsockopt, not one a call

# Of a connection that stays on this machine: what the sender copied is still in the cache when the
# receiver copies it, and both take turns more often. 2048 x 128 KiB on two cores that others wanted
# too: 91 instead of 253 ms read, 81 instead of 303 ms written; 128 and 512 KiB are worse. Over a
# network the kernel's own choice grows with the round trip.
_NEAR_BUFFER = 256 << 10

_RECEIVE = socket.SO_RCVTIMEO
_SEND = socket.SO_SNDTIMEO


class DeadlinePassed(Exception):
    """The caller's deadline passed before all bytes moved."""


def buffer_of(data: bytes) -> NDArray[np.uint8]:
    """`data` as an array, so that it has an address. It must outlive every use of that."""
    return np.frombuffer(data, np.uint8)


def whole(array: NDArray[Any]) -> Iovecs:
    """The one iovec of a contiguous array."""
    return np.array([(address_of(array), array.nbytes)], IOVEC)


def framed(head: NDArray[np.uint8], addresses: Uint64s, lengths: Uint64s) -> Iovecs:
    """A frame's head and the runs behind it, for one system call."""
    runs = np.empty(addresses.size + 1, IOVEC)
    runs["base"][0] = address_of(head)
    runs["len"][0] = head.nbytes
    runs["base"][1:] = addresses
    runs["len"][1:] = lengths
    return runs


class Stream:
    """Owns a connected socket. One thread moves bytes; any thread may `shutdown`."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        if _is_near(sock):
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                sock.setsockopt(socket.SOL_SOCKET, option, _NEAR_BUFFER)
        self._fd = sock.fileno()
        self._message = Message()
        self._timeouts: dict[int, float] = {}
        # Between close and shutdown: else the shutdown might meet a new file of the same number.
        self._open = threading.Lock()

    def fileno(self) -> int:
        """The descriptor, for calls that end before `close`."""
        return self._fd

    def arm(self, deadline: float) -> None:
        """Make blocking calls in both directions come back to look at the clock.

        Raises:
            DeadlinePassed: It has.
        """
        for option in (_RECEIVE, _SEND):
            self._arm(option, deadline)

    def set_timeouts(self, seconds: float) -> None:
        """How long a call without deadline may wait without a byte moving."""
        for option in (_RECEIVE, _SEND):
            self._set_timeout(option, seconds)

    def receive_some(self, runs: Iovecs) -> int:
        """Receive until `runs` are full or the socket's time-out passed; 0 at the end of stream.

        Raises:
            BlockingIOError: When the time-out passed without a byte.
            OSError: As the kernel says it.
        """
        return self._message.receive(self._fd, runs, socket.MSG_WAITALL)

    def receive(self, runs: Iovecs, size: int, deadline: float | None = None) -> None:
        """Fill `runs`, `size` bytes in all; they are used up by it.

        Raises:
            EOFError: When the peer closed first, or `shutdown` was called.
            DeadlinePassed: When `deadline` (`time.monotonic()`) passed.
            BlockingIOError: Without deadline: when the time-out passed without a byte.
            OSError: As the kernel says it.
        """
        self._move(self.receive_some, runs, size, _RECEIVE, deadline)

    def send(self, runs: Iovecs, size: int, deadline: float | None = None) -> None:
        """Hand the `size` bytes of `runs` to the kernel; uses `runs` up. Raises as `receive`."""
        self._move(self._send_some, runs, size, _SEND, deadline)

    def send_bytes(self, data: bytes, deadline: float | None = None) -> None:
        """Send a short frame. Raises as `receive`."""
        buffer = buffer_of(data)  # a name, because the iovec keeps only its address
        self.send(whole(buffer), len(data), deadline)

    def receive_bytes(self, size: int, deadline: float | None = None) -> bytes:
        """Receive exactly `size` bytes, a checked number. Raises as `receive`."""
        buffer = np.empty(size, np.uint8)
        self.receive(whole(buffer), size, deadline)
        return buffer.tobytes()

    def shutdown(self) -> None:
        """End both directions: a blocked call returns at once. Any thread; idempotent."""
        with self._open, contextlib.suppress(OSError):  # closed, or the peer was faster
            self._socket.shutdown(socket.SHUT_RDWR)

    def reset_on_close(self) -> None:
        """Tell the peer at once that nobody reads what it still sends.

        A receiver that was shut down announces no more room, and its closed socket answers no
        question for any: a peer that had filled it would wait until its TCP_USER_TIMEOUT, 10 s.
        """
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 0))

    def close(self) -> None:
        """Close the socket; never while a call runs. Idempotent."""
        with self._open:
            self._socket.close()
            self._fd = -1  # a late call meets EBADF, not a new file of the same number

    def _send_some(self, runs: Iovecs) -> int:
        return self._message.send(self._fd, runs, socket.MSG_NOSIGNAL)

    def _move(
        self,
        some: Callable[[Iovecs], int],
        runs: Iovecs,
        size: int,
        option: int,
        deadline: float | None,
    ) -> None:
        while size:
            if deadline is not None:
                self._arm(option, deadline)
            try:
                count = some(runs)
            except BlockingIOError:
                if deadline is None:
                    raise
                continue  # a tick; _arm looks at the clock
            if not count:
                raise EOFError
            size -= count
            if size:  # rarely: finding the place costs 5 us, a tenth of a small request
                runs = advance(runs, count)

    def _arm(self, option: int, deadline: float) -> None:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise DeadlinePassed
        self._set_timeout(option, min(remaining, TICK_S))

    def _set_timeout(self, option: int, seconds: float) -> None:
        if self._timeouts.get(option) != seconds:
            sockets.set_timeout(self._socket, option, seconds)
            self._timeouts[option] = seconds


def _is_near(sock: socket.socket) -> bool:
    """Are both ends on this machine? Then they have the same address."""
    try:
        here, there = sock.getsockname(), sock.getpeername()
    except OSError:  # it has ended already; its first use will say so
        return False
    return bool(here[0] == there[0])
