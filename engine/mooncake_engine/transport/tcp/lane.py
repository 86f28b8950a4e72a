"""The asking side: a lane moves one slice at a time, asks for it again when the peer hung up."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from typing_extensions import override

from mooncake_engine.errors import LaneError
from mooncake_engine.transport.base import Lane
from mooncake_engine.transport.tcp import wire
from mooncake_engine.transport.tcp.failures import explain
from mooncake_engine.transport.tcp.stream import DeadlinePassed
from mooncake_engine.types import Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from mooncake_engine.transport.tcp.dialer import Dialer
    from mooncake_engine.transport.tcp.exchange import Exchange
    from mooncake_engine.transport.tcp.stream import Stream
    from mooncake_engine.types import Slice


class TcpLane(Lane):
    """One or more connections; after anything but OK or REFUSED it is spent."""

    def __init__(
        self, dialer: Dialer, exchange: Callable[[Sequence[Stream]], Exchange], width: int = 1
    ) -> None:
        """Connect and greet.

        Args:
            dialer: Of the peer.
            exchange: Moves slices over these connections.
            width: How many to open; fewer will do where the peer serves no more.

        Raises `LaneError`.
        """
        self._dialer = dialer
        self._exchange_over = exchange
        self._width = width
        self._lock = threading.Lock()  # guards _interrupted and the change of _streams
        self._interrupted = False
        self._spent = ""
        self._streams: list[Stream] = []
        try:
            self._open()
        except BaseException:
            _close(self._streams)
            raise

    @override
    def move(self, piece: Slice, deadline: float) -> None:
        exchange = self._exchange
        if (
            self._spent
            or piece.remote.size > exchange.most_runs
            or piece.nbytes > exchange.most_bytes
            or len(piece.grant) > wire.MAX_GRANT
            or time.monotonic() >= deadline
        ):
            raise self._refusal(piece)
        try:
            try:
                refusal = exchange.move(piece, deadline, hurry=self.hurry)
            except (EOFError, BrokenPipeError, ConnectionResetError):
                # The peer hung up. That is its death, or the end of a grant: of this slice's, or
                # of the last slice's, whose bytes were here before its thread had noticed. Asking
                # anew tells them apart, and moving a slice twice is moving it once.
                if self._interrupted:
                    raise
                self._reopen()
                refusal = self._exchange.move(piece, deadline, hurry=self.hurry)
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
        self.moved_at = self._exchange.moved_at
        if refusal:
            raise self._error(Status.REFUSED, piece, f"the peer refused: {refusal}")

    @override
    def interrupt(self) -> None:
        with self._lock:
            self._interrupted = True
            for stream in self._streams:
                stream.shutdown()

    @override
    def close(self) -> None:
        self._exchange.close()
        _close(self._streams)

    def _refusal(self, piece: Slice) -> LaneError:
        """What can be known before a byte is sent; the lane stays good."""
        if self._spent:
            return self._error(
                Status.FAILED, piece, f"this lane ended before ({self._spent}); open another"
            )
        most_runs, most_bytes = self._exchange.most_runs, self._exchange.most_bytes
        if piece.remote.size > most_runs or piece.nbytes > most_bytes:
            return self._error(
                Status.FAILED,
                piece,
                f"a slice takes at most {most_runs} runs and {most_bytes} bytes",
            )
        if len(piece.grant) > wire.MAX_GRANT:
            return self._error(
                Status.FAILED,
                piece,
                f"a grant takes at most {wire.MAX_GRANT} bytes, not {len(piece.grant)}",
            )
        return self._error(Status.TIMED_OUT, piece, "its deadline passed before a lane was free")

    def _give_up(self) -> None:
        for stream in self._streams:
            stream.shutdown()
            stream.reset_on_close()  # a target that still sends is told, and frees its thread

    def _reopen(self) -> None:
        self._exchange.close()
        with self._lock:
            old, self._streams = self._streams, []
        _close(old)
        self._open()

    def _open(self) -> None:
        """Connect, which is not interruptible; greeting is."""
        streams = self._streams
        while len(streams) < self._width:
            stream = self._dialer.connect()
            with self._lock:
                streams.append(stream)
                if self._interrupted:
                    stream.shutdown()
            try:
                self._dialer.greet(stream)
            except LaneError:
                if len(streams) == 1:
                    raise
                stream.close()
                streams.pop()
                break
        self._exchange = self._exchange_over(streams)

    def _error(self, status: Status, piece: Slice, reason: str) -> LaneError:
        return LaneError(
            status,
            f"{piece.op} of {piece.nbytes} bytes in {piece.remote.size} runs over tcp with "
            f"{self._dialer.peer}: {reason}",
        )


def _close(streams: Iterable[Stream]) -> None:
    for stream in streams:
        stream.close()
