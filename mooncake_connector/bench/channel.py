"""Frames over two descriptors: a pair of pipes, or a socket twice. No wait without a limit.

A frame is a 4-byte big-endian length and so many bytes.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

PREFIX_BYTES = 4
#: How often a wait looks whether the other process still lives: a process that it left behind may
#: hold the pipe open after its end.
LOOK_S = 0.5


class ChannelEnded(Exception):
    """The other end is gone."""


class Channel:
    """Owns both descriptors. One thread uses it at a time.

    Raises `ChannelEnded` when the other end closed or is not `alive`, `TimeoutError` when a limit
    (seconds) is over; the channel is of no use afterwards.
    """

    def __init__(
        self, reading: int, writing: int, alive: Callable[[], bool] = lambda: True
    ) -> None:
        self._reading, self._writing, self._alive = reading, writing, alive
        self._rest = b""
        for descriptor in (reading, writing):
            os.set_blocking(descriptor, False)

    def send(self, body: bytes, limit_s: float) -> None:
        """One frame."""
        rest = memoryview(len(body).to_bytes(PREFIX_BYTES, "big") + body)
        deadline = time.monotonic() + limit_s
        while rest:
            self._wait(self._writing, select.POLLOUT, deadline)
            try:
                rest = rest[os.write(self._writing, rest) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise ChannelEnded(str(error)) from error

    def receive(self, limit_s: float | None) -> bytes:
        """The body of the next frame; None: wait as long as the other end lives."""
        deadline = None if limit_s is None else time.monotonic() + limit_s
        length = int.from_bytes(self._take(PREFIX_BYTES, deadline), "big")
        return self._take(length, deadline)

    def _take(self, count: int, deadline: float | None) -> bytes:
        parts = bytearray(self._rest)
        while len(parts) < count:
            self._wait(self._reading, select.POLLIN, deadline)
            try:
                got = os.read(self._reading, 1 << 20)
            except BlockingIOError:
                continue
            except OSError as error:
                raise ChannelEnded(str(error)) from error
            if not got:
                raise ChannelEnded("closed by the other end")
            parts += got
        self._rest = bytes(parts[count:])
        return bytes(parts[:count])

    def _wait(self, descriptor: int, event: int, deadline: float | None) -> None:
        if descriptor < 0:
            raise ChannelEnded("closed at this end")
        poller = select.poll()
        poller.register(descriptor, event)
        while True:
            left = LOOK_S if deadline is None else min(LOOK_S, deadline - time.monotonic())
            if poller.poll(max(0.0, left) * 1000):
                return
            if not self._alive():
                raise ChannelEnded("the process ended")
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError

    def close(self) -> None:
        """Idempotent."""
        for descriptor in {self._reading, self._writing} - {-1}:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._reading = self._writing = -1
