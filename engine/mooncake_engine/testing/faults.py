"""Lanes that wait, fail or are slow on command; put between an engine and its transports.

Nothing here sleeps or throws dice: a test says what happens and waits until it has happened.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from typing_extensions import override

from mooncake_engine.errors import LaneError, PathLost
from mooncake_engine.transport.base import Capabilities, Lane, Link, Transport
from mooncake_engine.types import Status

if TYPE_CHECKING:
    import msgspec

    from mooncake_engine.engine import TransferEngine
    from mooncake_engine.types import Region, SegmentRecord, Slice


class Faults:
    """What the lanes of one engine do wrong. Safe to use from any thread, also meanwhile."""

    def __init__(self, *, delay_per_slice_s: float = 0.0, slice_bytes: int | None = None) -> None:
        """Args: slice_bytes: upper bound for slices, so that a small batch becomes many."""
        self.delay_per_slice_s = delay_per_slice_s
        self.slice_bytes = slice_bytes
        self._changed = threading.Condition()  # guards all below
        self._pass: int | None = None  # moves let through before they are held; None: all
        self._stubborn = False
        self._held = 0
        self._failures: list[LaneError] = []
        self._open_failures: list[LaneError] = []
        self._lost: str | None = None
        self._moves = 0
        self._opened = 0

    @property
    def moves(self) -> int:
        """Slices that reached the transport."""
        return self._moves

    @property
    def opened(self) -> int:
        """Lanes opened so far."""
        return self._opened

    def hold(self, after: int = 0, *, stubborn: bool = False) -> None:
        """Let `after` more slices through and hold those that follow until `release`.

        A held slice ends early when its lane is interrupted or at its deadline, unless `stubborn`.
        """
        with self._changed:
            self._pass, self._stubborn = after, stubborn

    def release(self) -> None:
        """Let all held slices go on to the transport."""
        with self._changed:
            self._pass = None
            self._changed.notify_all()

    def wait_held(self, count: int = 1, timeout: float = 10.0) -> None:
        """Block until `count` slices are held. Raises `TimeoutError`."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._held >= count, timeout):
                raise TimeoutError(f"{self._held} slices are held after {timeout} s, not {count}")

    def fail(self, status: Status, message: str, times: int = 1) -> None:
        """Make the next slices fail without reaching the transport."""
        with self._changed:
            self._failures += [LaneError(status, message) for _ in range(times)]

    def fail_open(self, status: Status, message: str, times: int = 1) -> None:
        """Make the next lanes impossible to open."""
        with self._changed:
            self._open_failures += [LaneError(status, message) for _ in range(times)]

    def lose(self, message: str) -> None:
        """Until `recover`, no lane moves or opens: the way is gone (`PathLost`), not the peer.

        Slices that are held meanwhile are lost too, once released.
        """
        with self._changed:
            self._lost = message

    def recover(self) -> None:
        """The way is back."""
        with self._changed:
            self._lost = None

    def before_open(self) -> None:
        """Called by a link; raises what `fail_open` or `lose` asked for."""
        with self._changed:
            self._opened += 1
            self._check_way()
            if self._open_failures:
                raise self._open_failures.pop()

    def before_move(self, interrupted: threading.Event, deadline: float) -> None:
        """Called by a lane; returns when the slice may move, else raises `LaneError`."""
        with self._changed:
            self._check_way()
            if self._failures:
                raise self._failures.pop()
            if self._pass:
                self._pass -= 1
            elif self._pass is not None:
                self._wait_for_release(interrupted, deadline)
                self._check_way()
            end = min(deadline, time.monotonic() + self.delay_per_slice_s)
            while not interrupted.is_set() and (left := end - time.monotonic()) > 0:
                self._changed.wait(left)
            if interrupted.is_set():
                raise LaneError(Status.CANCELLED, "the lane was interrupted")
            self._moves += 1

    def _check_way(self) -> None:
        if self._lost is not None:
            raise PathLost(self._lost)

    def _wait_for_release(self, interrupted: threading.Event, deadline: float) -> None:
        self._held += 1
        self._changed.notify_all()
        try:
            while self._pass is not None and (self._stubborn or not interrupted.is_set()):
                left = deadline - time.monotonic()
                if left <= 0 and not self._stubborn:
                    raise LaneError(Status.TIMED_OUT, "the slice was held until its deadline")
                self._changed.wait(None if self._stubborn else left)
        finally:
            self._held -= 1

    def wake(self) -> None:
        """A lane was interrupted: let held slices look again."""
        with self._changed:
            self._changed.notify_all()


def install(engine: TransferEngine, faults: Faults, *schemes: str) -> None:
    """Put `faults` into every link of these transports (none named: all) made from now on."""
    for scheme in schemes or tuple(engine.transports):
        engine.transports[scheme] = FaultyTransport(engine.transports[scheme], faults)


class FaultyTransport(Transport):
    """Another transport whose lanes obey a `Faults`."""

    capabilities = Capabilities()  # that of `inner`, once there is an instance

    def __init__(self, inner: Transport, faults: Faults) -> None:
        super().__init__(inner.config, inner.regions, inner.grants, inner.incarnation)
        # Of the instance, not of the class as elsewhere: it stands in for any transport.
        self.scheme = inner.scheme  # type: ignore[misc]  # see above
        self.capabilities = inner.capabilities
        self._inner = inner
        self._faults = faults

    @override
    def register(self, region: Region) -> None:
        self._inner.register(region)

    @override
    def unregister(self, region: Region) -> None:
        self._inner.unregister(region)

    @override
    def endpoint(self) -> msgspec.Raw:
        return self._inner.endpoint()

    @override
    def connect(self, peer: SegmentRecord) -> Link:
        return _FaultyLink(self._inner.connect(peer), self._faults)

    @override
    def close(self) -> None:
        self._inner.close()


class _FaultyLink(Link):
    def __init__(self, inner: Link, faults: Faults) -> None:
        self._inner = inner
        self._faults = faults
        self.lanes = inner.lanes
        self.slice_bytes = min(inner.slice_bytes, faults.slice_bytes or inner.slice_bytes)
        self.slice_runs = inner.slice_runs
        if inner.bulk is not None:
            self.bulk = _FaultyLink(inner.bulk, faults)

    @override
    def open_lane(self) -> Lane:
        self._faults.before_open()
        return _FaultyLane(self._inner.open_lane(), self._faults)

    @override
    def close(self) -> None:
        self._inner.close()


class _FaultyLane(Lane):
    def __init__(self, inner: Lane, faults: Faults) -> None:
        self._inner = inner
        self._faults = faults
        self._interrupted = threading.Event()

    @override
    def move(self, piece: Slice, deadline: float) -> None:
        self._faults.before_move(self._interrupted, deadline)
        self._inner.move(piece, deadline)

    @override
    def interrupt(self) -> None:
        self._interrupted.set()
        self._faults.wake()
        self._inner.interrupt()

    @override
    def close(self) -> None:
        self._inner.close()
