"""The reference transport: both engines in one process, bytes moved by memmove.

Written to be read beside base.py: everything that the contract asks for, nothing for speed.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from typing import TYPE_CHECKING, ClassVar

import msgspec
from typing_extensions import override

from mooncake_engine.errors import LaneError, OutOfBounds, PathUnavailable
from mooncake_engine.transport.base import Capabilities, Lane, Link, Transport
from mooncake_engine.types import Op, Status

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mooncake_engine.config import EngineConfig
    from mooncake_engine.grants import GrantTable
    from mooncake_engine.memory import RegionTable
    from mooncake_engine.types import SegmentRecord, Slice

#: Bytes between two looks at the clock and at interrupts: about 1 ms of memmove, well below the
#: 100 ms that the contract gives.
CHUNK = 4 << 20


class LoopbackTransport(Transport):
    """Reaches every engine of this process that runs it too."""

    scheme: ClassVar[str] = "loopback"
    capabilities: ClassVar[Capabilities] = Capabilities(same_machine_only=True)
    #: incarnation -> transport
    _here: ClassVar[dict[str, LoopbackTransport]] = {}

    def __init__(
        self, config: EngineConfig, regions: RegionTable, grants: GrantTable, incarnation: str
    ) -> None:
        super().__init__(config, regions, grants, incarnation)
        self._changed = threading.Condition()  # guards the two below
        self._serving = 0
        self._closed = False
        self._here[incarnation] = self

    @override
    def endpoint(self) -> msgspec.Raw:
        return msgspec.Raw(msgspec.msgpack.encode(None))

    @override
    def connect(self, peer: SegmentRecord) -> Link:
        target = self._here.get(peer.incarnation)
        if target is None:
            raise PathUnavailable(f"{peer.name} does not live in this process")
        return LoopbackLink(target)

    @override
    def close(self) -> None:
        self._here.pop(self.incarnation, None)
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._serving)

    @property
    def closed(self) -> bool:
        """Whether `close` was called; a peer's lane stops at the next chunk."""
        return self._closed

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """A peer's lane touches our memory; `close` waits for it."""
        with self._changed:
            if self._closed:
                raise LaneError(Status.PEER_GONE, "the target engine was closed")
            self._serving += 1
        try:
            yield
        finally:
            with self._changed:
                self._serving -= 1
                self._changed.notify_all()


class LoopbackLink(Link):
    """Two lanes, so that tests see slices of one batch overlap."""

    lanes = 2

    def __init__(self, target: LoopbackTransport) -> None:
        self._target = target

    @override
    def open_lane(self) -> Lane:
        if self._target.closed:
            raise LaneError(Status.PEER_GONE, "the target engine was closed")
        return LoopbackLane(self._target)

    @override
    def close(self) -> None:
        """A loopback link holds nothing."""


class LoopbackLane(Lane):
    """Moves a slice in the calling thread."""

    def __init__(self, target: LoopbackTransport) -> None:
        self._target = target
        self._interrupted = threading.Event()

    @override
    def move(self, piece: Slice, deadline: float) -> None:
        revoked = threading.Event()
        try:
            with (
                self._target.serving(),
                self._target.grants.serving(piece.grant, revoked.set),
                self._target.regions.serving(piece.remote, piece.lengths, revoked.set),
            ):
                for into, source, length in _chunks(piece):
                    self._check(deadline, revoked)
                    ctypes.memmove(into, source, length)
                self._check(deadline, revoked)
        except OutOfBounds as error:
            raise LaneError(Status.REFUSED, str(error)) from error

    def _check(self, deadline: float, revoked: threading.Event) -> None:
        if self._interrupted.is_set():
            raise LaneError(Status.CANCELLED, "the lane was interrupted")
        if revoked.is_set():
            raise LaneError(Status.REFUSED, "the grant or the region ended while the slice moved")
        if self._target.closed:
            raise LaneError(Status.PEER_GONE, "the target engine was closed")
        if time.monotonic() > deadline:
            raise LaneError(Status.TIMED_OUT, "the slice did not end by its deadline")

    @override
    def interrupt(self) -> None:
        self._interrupted.set()

    @override
    def close(self) -> None:
        """A loopback lane holds nothing."""


def _chunks(piece: Slice) -> Iterator[tuple[int, int, int]]:
    """(destination, source, length) with length <= CHUNK."""
    pair = (piece.local, piece.remote) if piece.op is Op.READ else (piece.remote, piece.local)
    for into, source, length in zip(
        pair[0].tolist(), pair[1].tolist(), piece.lengths.tolist(), strict=True
    ):
        for done in range(0, length, CHUNK):
            yield into + done, source + done, min(CHUNK, length - done)
