"""The asking side: a lane moves one slice at a time, asks for it again when the peer hung up."""

from __future__ import annotations

import itertools
import threading
import time
from typing import TYPE_CHECKING

from typing_extensions import override

from mooncake_engine.errors import LaneError
from mooncake_engine.transport.base import Lane
from mooncake_engine.transport.tcp import wire
from mooncake_engine.transport.tcp.exchange import exchange_over
from mooncake_engine.transport.tcp.failures import explain
from mooncake_engine.transport.tcp.stream import DeadlinePassed
from mooncake_engine.types import Status

if TYPE_CHECKING:
    from mooncake_engine.native import Library
    from mooncake_engine.transport.tcp.dialer import Dialer
    from mooncake_engine.types import Slice


class TcpLane(Lane):
    """One connection; after anything but OK or REFUSED it is spent."""

    def __init__(self, dialer: Dialer, library: Library | None) -> None:
        """Connect and greet; `library`: move with its loop. Raises `LaneError`."""
        self._dialer = dialer
        self._library = library
        self._stream = dialer.connect()
        self._lock = threading.Lock()  # guards _interrupted and the change of _stream
        self._interrupted = False
        self._request_ids = itertools.count(1)
        self._spent = ""
        try:
            self._exchange = exchange_over(self._stream, library)
            dialer.greet(self._stream)
        except BaseException:
            self._stream.close()
            raise

    @override
    def move(self, piece: Slice, deadline: float) -> None:
        self._check(piece, deadline)
        try:
            try:
                refusal = self._ask(piece, deadline)
            except (EOFError, BrokenPipeError, ConnectionResetError):
                # The peer hung up. That is its death, or the end of a grant: of this slice's, or
                # of the last slice's, whose bytes were here before its thread had noticed. Asking
                # anew tells them apart, and moving a slice twice is moving it once.
                if self._interrupted:
                    raise
                self._reopen()
                refusal = self._ask(piece, deadline)
        except (OSError, EOFError, DeadlinePassed, wire.Malformed, LaneError) as failure:
            # Nobody knows where the next frame starts; what still arrives must find no lane.
            self._give_up()
            status, reason = explain(failure)
            if self._interrupted:
                status, reason = Status.CANCELLED, "the lane was interrupted"
            self._spent = reason
            raise self._error(status, piece, reason) from failure
        except BaseException:  # Ctrl-C, where the caller's own thread moves the slice
            self._give_up()
            self._spent = "the thread that used it was interrupted"
            raise
        if refusal:
            raise self._error(Status.REFUSED, piece, f"the peer refused: {refusal}")

    @override
    def interrupt(self) -> None:
        with self._lock:
            self._interrupted = True
            self._stream.shutdown()

    @override
    def close(self) -> None:
        self._stream.close()

    def _check(self, piece: Slice, deadline: float) -> None:
        """What can be known before a byte is sent; the lane stays good."""
        if self._spent:
            raise self._error(
                Status.FAILED, piece, f"this lane ended before ({self._spent}); open another"
            )
        if piece.remote.size > wire.MAX_RUNS or piece.nbytes > wire.MAX_NBYTES:
            raise self._error(
                Status.FAILED,
                piece,
                f"a slice takes at most {wire.MAX_RUNS} runs and {wire.MAX_NBYTES} bytes",
            )
        if len(piece.grant) > wire.MAX_GRANT:
            raise self._error(
                Status.FAILED,
                piece,
                f"a grant takes at most {wire.MAX_GRANT} bytes, not {len(piece.grant)}",
            )
        if time.monotonic() >= deadline:
            raise self._error(Status.TIMED_OUT, piece, "its deadline passed before a lane was free")

    def _ask(self, piece: Slice, deadline: float) -> str:
        return self._exchange.move(piece, next(self._request_ids), deadline)

    def _give_up(self) -> None:
        self._stream.shutdown()
        self._stream.reset_on_close()  # a target that still sends is told, and frees its thread

    def _reopen(self) -> None:
        # Not interruptible, but its kernel answered just now; the greeting is.
        stream = self._dialer.connect()
        with self._lock:
            old, self._stream = self._stream, stream
            if self._interrupted:
                stream.shutdown()
        old.close()
        self._exchange = exchange_over(stream, self._library)
        self._dialer.greet(stream)

    def _error(self, status: Status, piece: Slice, reason: str) -> LaneError:
        return LaneError(
            status,
            f"{piece.op} of {piece.nbytes} bytes in {piece.remote.size} runs over tcp with "
            f"{self._dialer.peer}: {reason}",
        )
