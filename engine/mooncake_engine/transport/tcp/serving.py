"""Serves one greeted lane: frames in, registered memory out or in, until the peer leaves.

Everything where Python serves alone; where serve.c does, what that handed over.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import numpy as np

from mooncake_engine.errors import LaneError, OutOfBounds
from mooncake_engine.iovec import address_of, iovecs
from mooncake_engine.transport.tcp import wire
from mooncake_engine.transport.tcp.frames import Arrived
from mooncake_engine.transport.tcp.stream import buffer_of, framed, whole
from mooncake_engine.types import Op, Status

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mooncake_engine.grants import GrantTable
    from mooncake_engine.memory import RegionTable
    from mooncake_engine.transport.tcp.frames import Frames
    from mooncake_engine.types import Uint64s

_SCRATCH = 64 << 10


class Serving:
    """The target's half of one lane. Runs on the lane's own thread."""

    def __init__(self, frames: Frames, regions: RegionTable, grants: GrantTable) -> None:
        self._frames = frames
        self._stream = frames.stream
        self._regions = regions
        self._grants = grants

    def run(self) -> None:
        """Serve until the peer leaves between two frames.

        Raises:
            Malformed: The peer sent what no frame is.
            BlockingIOError: It stopped taking or sending bytes in the middle of a frame.
            OSError | EOFError: The connection broke, or a revoked grant shut it down.
        """
        while (arrived := self._frames.next()) is not Arrived.NOTHING:
            request = wire.unpack_request(self._frames.header.tobytes())
            body = self._frames.body[: request.body_size]
            if arrived is Arrived.HEADER:
                self._stream.receive(whole(body), request.body_size)
            tables = body[: 16 * request.runs].view(np.uint64)
            addresses, lengths = tables[: request.runs], tables[request.runs :]
            wire.check_lengths(lengths, request.nbytes)
            grant = body[16 * request.runs :][: request.grant_size].tobytes()
            self._serve(request, addresses, lengths, grant)

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
