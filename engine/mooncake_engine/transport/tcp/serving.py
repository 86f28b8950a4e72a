"""Serves one greeted lane: frames in, registered memory out or in, until the peer leaves."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import numpy as np

from mooncake_engine.errors import LaneError, OutOfBounds
from mooncake_engine.iovec import address_of, iovecs
from mooncake_engine.transport.tcp import wire
from mooncake_engine.transport.tcp.stream import buffer_of, framed, whole
from mooncake_engine.types import Op, Status

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mooncake_engine.grants import GrantTable
    from mooncake_engine.memory import RegionTable
    from mooncake_engine.transport.tcp.stream import Stream
    from mooncake_engine.types import Uint64s

_SCRATCH = 64 << 10


class Serving:
    """The target's half of one lane. Runs on the lane's own thread."""

    def __init__(self, stream: Stream, regions: RegionTable, grants: GrantTable) -> None:
        self._stream = stream
        self._regions = regions
        self._grants = grants
        # One buffer per lane for its whole life: a peer's numbers allocate nothing.
        self._header = np.empty(wire.REQUEST.size, np.uint8)
        self._body = np.empty(wire.MAX_BODY, np.uint8)

    def run(self) -> None:
        """Serve until the peer leaves between two frames.

        Raises:
            Malformed: The peer sent what no frame is.
            BlockingIOError: It stopped taking or sending bytes in the middle of a frame.
            OSError | EOFError: The connection broke, or a revoked grant shut it down.
        """
        while self._next_header():
            request = wire.unpack_request(self._header.tobytes())
            body = self._body[: request.body_size]
            self._stream.receive(whole(body), request.body_size)
            tables = body[: 16 * request.runs].view(np.uint64)
            addresses, lengths = tables[: request.runs], tables[request.runs :]
            wire.check_lengths(lengths, request.nbytes)
            grant = body[16 * request.runs :].tobytes()
            self._serve(request, addresses, lengths, grant)

    def _next_header(self) -> bool:
        """Wait for the next frame for as long as it takes; False when the peer has left."""
        while True:
            runs = whole(self._header)
            with contextlib.suppress(BlockingIOError):  # idle is not stopped: no frame is begun
                count = self._stream.receive_some(runs)
                break
        if count:
            rest = self._header[count:]
            self._stream.receive(whole(rest), rest.size)
        return bool(count)

    def _serve(
        self, request: wire.Request, addresses: Uint64s, lengths: Uint64s, grant: bytes
    ) -> None:
        try:
            with self._permission(addresses, lengths, grant):
                if request.op is Op.READ:
                    head = buffer_of(wire.pack_answer(Status.OK, request.request_id))
                    runs = framed(head, addresses, lengths)
                    self._stream.send(runs, head.size + request.nbytes)
                    return
                self._stream.receive(iovecs(addresses, lengths), request.nbytes)
        except (LaneError, OutOfBounds) as refusal:  # raised only before a byte moved
            if request.op is Op.WRITE:
                self._drain(request.nbytes)
            answer = wire.pack_answer(Status.REFUSED, request.request_id, str(refusal))
        else:
            answer = wire.pack_answer(Status.OK, request.request_id)
        self._stream.send_bytes(answer)

    @contextlib.contextmanager
    def _permission(self, addresses: Uint64s, lengths: Uint64s, grant: bytes) -> Iterator[None]:
        """Hold the grant and the regions; their owner's taking them back shuts the lane down."""
        interrupt = self._stream.shutdown
        with (
            self._grants.serving(grant, interrupt),
            self._regions.serving(addresses, lengths, interrupt),
        ):
            yield

    def _drain(self, nbytes: int) -> None:
        """Receive a refused write's bytes into nowhere, so that the lane lives on."""
        scratch = np.empty(_SCRATCH, np.uint8)
        chunks, rest = divmod(nbytes, _SCRATCH)
        lengths = np.full(chunks + 1, _SCRATCH, np.uint64)
        lengths[-1] = rest
        addresses = np.full(chunks + 1, address_of(scratch), np.uint64)  # all the same memory
        self._stream.receive(iovecs(addresses, lengths), nbytes)
