"""One slice asked for and moved: by a loop in C where that is built, by Python everywhere."""

from __future__ import annotations

import abc
import ctypes
import itertools
import os
import struct
from typing import TYPE_CHECKING

from typing_extensions import override

from mooncake_engine.iovec import iovecs
from mooncake_engine.native import Outcome, packed
from mooncake_engine.native.ledgers import owned
from mooncake_engine.transport.tcp import wire
from mooncake_engine.transport.tcp.stream import DeadlinePassed, buffer_of, framed
from mooncake_engine.types import Op, Status

if TYPE_CHECKING:
    from mooncake_engine.native import Library
    from mooncake_engine.transport.tcp.stream import Stream
    from mooncake_engine.types import Slice

# A slice up to this is moved with the interpreter lock held: its bytes are copied in 5 us, and to
# give the lock up beside a busy Python thread costs 5 ms. It is held for 50 us at most.
_HELD_BYTES = 64 << 10

# struct told of native.h
_TOLD = struct.Struct(f"<{wire.ANSWER.size}sQQ{wire.MAX_REASON}s")


class Exchange(abc.ABC):
    """Moves slices over greeted streams, one at a time.

    Attributes:
        most_runs: Of one slice.
        most_bytes: Of one slice.
        moved_at: `Lane.moved_at`.
    """

    most_runs: int = wire.MAX_RUNS
    most_bytes: int = wire.MAX_NBYTES
    moved_at: float = 0.0

    @abc.abstractmethod
    def move(self, piece: Slice, deadline: float, *, hurry: bool) -> str:
        """Ask for the slice and move it; the reason when the target refused, else empty.

        `hurry` is `Lane.hurry`.

        Raises:
            EOFError | OSError | DeadlinePassed: As `Stream.receive`.
            Malformed: The peer answered what is no answer.
        """

    def close(self) -> None:  # noqa: B027 - most have nothing to give back
        """Let go of the streams. Never while a slice moves; idempotent."""


def exchange_over(stream: Stream, library: Library | None) -> Exchange:
    """With the library when there is one."""
    return NativeExchange(stream, library) if library else PythonExchange(stream)


class PythonExchange(Exchange):
    """The twin of exchange.c: a system call for each part."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._request_ids = itertools.count(1)

    @override
    def move(self, piece: Slice, deadline: float, *, hurry: bool) -> str:
        request_id = next(self._request_ids)
        request = wire.pack_request(piece, request_id)
        if piece.op is Op.READ:
            self._stream.send_bytes(request, deadline)
        else:
            head = buffer_of(request)
            runs = framed(head, piece.local, piece.lengths)
            self._stream.send(runs, len(request) + piece.nbytes, deadline)
        header = self._stream.receive_bytes(wire.ANSWER.size, deadline)
        status, reason_size = wire.unpack_answer(header, request_id)
        if status is not Status.OK:
            return self._stream.receive_bytes(reason_size, deadline).decode(errors="replace")
        if piece.op is Op.READ:
            self._stream.receive(iovecs(piece.local, piece.lengths), piece.nbytes, deadline)
        return ""


class NativeExchange(Exchange):
    """One call for all of it; what is no plain OK comes back here, where its text is made."""

    def __init__(self, stream: Stream, library: Library) -> None:
        self._stream = stream
        self._library = library
        self._hold = library.holding.exchange_hold
        self._state = owned(
            self, library.exchange_new(stream.fileno()), library.exchange_free, "a tcp lane's state"
        )

    @override
    def move(self, piece: Slice, deadline: float, *, hurry: bool) -> str:
        if piece.nbytes <= _HELD_BYTES:
            outcome = self._hold(self._state, packed(piece))
        else:
            self._stream.arm(deadline)
            outcome = self._library.exchange_start(self._state, packed(piece))
        while outcome == Outcome.AGAIN:
            self._stream.arm(deadline)
            outcome = self._library.exchange_go_on(self._state)
        if not outcome:
            return ""
        if outcome == Outcome.HANDED:
            return refusal(self._stream, self._library.exchange_told(self._state), deadline)
        raise failure(outcome)


def refusal(stream: Stream, told: int, deadline: float) -> str:
    """Why the target refused; `told`: the address of what C found to be no OK (struct told)."""
    header, request_id, came, reason = _TOLD.unpack(ctypes.string_at(told, _TOLD.size))
    status, reason_size = wire.unpack_answer(header, request_id)
    if status is Status.OK:
        raise wire.Malformed(f"it said OK to request {request_id} and gave a reason")
    if came > reason_size:
        raise wire.Malformed(f"it refused request {request_id} and sent more than the reason")
    text: bytes = reason[:came] + stream.receive_bytes(reason_size - came, deadline)
    return text.decode(errors="replace")


def failure(outcome: int) -> Exception:
    """What a loop in C ended with, as the error that its Python twin raises."""
    if outcome == Outcome.ENDED:
        return EOFError()
    if outcome == Outcome.LATE:
        return DeadlinePassed()
    return OSError(-outcome, os.strerror(-outcome))
