"""One slice asked for and moved: by a loop in C where that is built, by Python everywhere."""

from __future__ import annotations

import abc
import ctypes
import os
from typing import TYPE_CHECKING

from typing_extensions import override

from mooncake_engine.iovec import iovecs
from mooncake_engine.native import Outcome
from mooncake_engine.native.ledgers import owned
from mooncake_engine.transport.tcp import wire
from mooncake_engine.transport.tcp.stream import buffer_of, framed
from mooncake_engine.types import Op, Status

if TYPE_CHECKING:
    from mooncake_engine.native import Library
    from mooncake_engine.transport.tcp.stream import Stream
    from mooncake_engine.types import Slice

# A slice up to this is moved with the interpreter lock held: its bytes are copied in 5 us, and to
# give the lock up beside a busy Python thread costs 5 ms. It is held for 50 us at most.
_HELD_BYTES = 64 << 10


class Exchange(abc.ABC):
    """Moves slices over one greeted stream, one at a time."""

    @abc.abstractmethod
    def move(self, piece: Slice, request_id: int, deadline: float) -> str:
        """Ask for the slice and move it; the reason when the target refused, else empty.

        Raises:
            EOFError | OSError | DeadlinePassed: As `Stream.receive`.
            Malformed: The peer answered what is no answer.
        """


def exchange_over(stream: Stream, library: Library | None) -> Exchange:
    """With the library when there is one."""
    return NativeExchange(stream, library) if library else PythonExchange(stream)


class PythonExchange(Exchange):
    """The twin of exchange.c: a system call for each part."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    @override
    def move(self, piece: Slice, request_id: int, deadline: float) -> str:
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
        self._state = owned(
            self, library.exchange_new(stream.fileno()), library.exchange_free, "a tcp lane's state"
        )

    @override
    def move(self, piece: Slice, request_id: int, deadline: float) -> str:
        if piece.nbytes <= _HELD_BYTES:
            start = self._library.exchange_hold
        else:
            start = self._library.exchange_start
            self._stream.arm(deadline)
        # Names, because C keeps the addresses until the exchange is over.
        remote, lengths, local = (
            array.tobytes() for array in (piece.remote, piece.lengths, piece.local)
        )
        outcome = start(
            self._state,
            wire.pack_header(piece, request_id),
            wire.pack_answer(Status.OK, request_id),
            remote,
            lengths,
            local,
            piece.remote.size,
            piece.nbytes,
            piece.grant,
            len(piece.grant),
            piece.op is Op.WRITE,
        )
        while outcome == Outcome.AGAIN:
            self._stream.arm(deadline)
            outcome = self._library.exchange_go_on(self._state)
        if outcome == Outcome.DONE:
            return ""
        if outcome == Outcome.HANDED:
            return self._judge(request_id, deadline)
        if outcome == Outcome.ENDED:
            raise EOFError
        raise OSError(-outcome, os.strerror(-outcome))

    def _judge(self, request_id: int, deadline: float) -> str:
        answer = self._library.exchange_answer(self._state)
        header = ctypes.string_at(answer, wire.ANSWER.size)
        status, reason_size = wire.unpack_answer(header, request_id)
        if status is Status.OK:
            raise wire.Malformed(f"it said OK to request {request_id} and gave a reason")
        return self._stream.receive_bytes(reason_size, deadline).decode(errors="replace")
