"""The asking side: a link to one peer, and lanes that each move one slice at a time."""

from __future__ import annotations

import errno
import itertools
import time
from typing import TYPE_CHECKING

import numpy as np
from typing_extensions import override

from mooncake_engine.errors import LaneError
from mooncake_engine.iovec import iovecs
from mooncake_engine.transport.base import Lane
from mooncake_engine.transport.tcp import wire
from mooncake_engine.transport.tcp.stream import DeadlinePassed, buffer_of, framed, whole
from mooncake_engine.types import Op, Status

if TYPE_CHECKING:
    from mooncake_engine.transport.tcp.stream import Stream
    from mooncake_engine.types import Slice

# Every other errno is FAILED: something is wrong here, not there.
_GONE = frozenset(
    {
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENOTCONN,
        errno.EPIPE,
        errno.ETIMEDOUT,
    }
)
_GONE_HINT = (
    "it died, restarted, ended the grant or unregistered the memory; look its segment up again "
    "and retry"
)


def explain(failure: Exception) -> tuple[Status, str]:
    """The one table from what a stream or the wire raises to a status, what happened, a remedy."""
    match failure:
        case DeadlinePassed():
            return Status.TIMED_OUT, (
                "the deadline passed before all bytes moved; the peer is stopped or overloaded, "
                "or transfer_timeout_s is too short"
            )
        case EOFError():
            return Status.PEER_GONE, f"the peer closed the connection; {_GONE_HINT}"
        case wire.Malformed():
            return Status.FAILED, f"the peer broke the protocol: {failure}; compare both versions"
        case OSError() if failure.errno in _GONE:
            return Status.PEER_GONE, f"{failure}; {_GONE_HINT}"
        case OSError() if failure.errno == errno.EFAULT:
            return Status.FAILED, (
                "the local memory is not mapped; keep it allocated until the batch has completed"
            )
        case _:
            return Status.FAILED, f"{failure}; see this machine's kernel log and limits"


class TcpLane(Lane):
    """One connection to `peer`; after anything but OK or REFUSED it is spent."""

    def __init__(self, stream: Stream, peer: str) -> None:
        """Take over a stream whose handshake is done; `peer` is its name in messages."""
        self._stream = stream
        self._peer = peer
        self._request_ids = itertools.count(1)
        self._interrupted = False
        self._spent = ""

    @override
    def move(self, piece: Slice, deadline: float) -> None:
        self._check(piece, deadline)
        try:
            if piece.op is Op.READ:
                self._read(piece, deadline)
            else:
                self._write(piece, deadline)
        except (OSError, EOFError, DeadlinePassed, wire.Malformed) as failure:
            # Nobody knows where the next frame starts; what still arrives must find no lane.
            self._stream.shutdown()
            status, reason = explain(failure)
            if self._interrupted:
                status, reason = Status.CANCELLED, "the lane was interrupted"
            self._spent = reason
            raise self._error(status, piece, reason) from failure

    @override
    def interrupt(self) -> None:
        self._interrupted = True
        self._stream.shutdown()

    @override
    def close(self) -> None:
        self._stream.close()

    def _check(self, piece: Slice, deadline: float) -> None:
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
        if time.monotonic() >= deadline:  # nothing was sent, so the lane stays good
            raise self._error(Status.TIMED_OUT, piece, "its deadline passed before a lane was free")

    def _read(self, piece: Slice, deadline: float) -> None:
        request_id = next(self._request_ids)
        request = buffer_of(wire.pack_request(piece, request_id))
        self._stream.send(whole(request), deadline)
        self._answer(piece, request_id, deadline)
        self._stream.receive(iovecs(piece.local, piece.lengths), deadline)

    def _write(self, piece: Slice, deadline: float) -> None:
        request_id = next(self._request_ids)
        request = buffer_of(wire.pack_request(piece, request_id))
        self._stream.send(framed(request, piece.local, piece.lengths), deadline)
        self._answer(piece, request_id, deadline)

    def _answer(self, piece: Slice, request_id: int, deadline: float) -> None:
        """Return when the target agreed, raise `LaneError` when it did not."""
        header = self._take(wire.ANSWER.size, deadline)
        status, reason_size = wire.unpack_answer(header, request_id)
        if status is not Status.OK:
            reason = self._take(reason_size, deadline).decode(errors="replace")
            raise self._error(status, piece, f"the peer refused: {reason}")

    def _take(self, size: int, deadline: float) -> bytes:
        buffer = np.empty(size, np.uint8)
        self._stream.receive(whole(buffer), deadline)
        return buffer.tobytes()

    def _error(self, status: Status, piece: Slice, reason: str) -> LaneError:
        return LaneError(
            status,
            f"{piece.op} of {piece.nbytes} bytes in {piece.remote.size} runs over tcp with "
            f"{self._peer}: {reason}",
        )
