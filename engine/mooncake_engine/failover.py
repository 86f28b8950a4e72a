"""Another path for a segment whose own is lost while its peer lives.

Every slice is tried on the segment's path first. When that raises `PathLost`, the same slice moves
again over the link's `Detour`, connected when first needed. Reads and writes are of the same bytes,
so moving a slice twice is moving it once; and a lane that raised has let go of it, so it is never
under way on two paths.

Connecting may block for seconds and knows no interrupt, and a lane has to heed one within 100 ms:
each opening has a short-lived thread, and a lane that must not wait any longer leaves it behind.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, NamedTuple

from typing_extensions import override

from mooncake_engine import slicing
from mooncake_engine.errors import LaneError, PathLost, PathUnavailable
from mooncake_engine.transport.base import Lane, Link
from mooncake_engine.types import Path, Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from mooncake_engine.transport.base import Capabilities
    from mooncake_engine.types import Slice

_log = logging.getLogger(__name__)

#: `close` waits this long for what still connects: two transports' time-outs (5 s by default).
JOIN_S = 10.0


class Route(NamedTuple):
    """A connected path to a peer."""

    path: Path
    link: Link
    capabilities: Capabilities


class FailoverLink(Link):
    """The link of a segment's path, with a detour for when that is lost."""

    def __init__(self, first: Route, around: Callable[[], Route] | None) -> None:
        """Args: around: connects another path, or raises `PathUnavailable`; None: not permitted."""
        self._detour = Detour(first.path.scheme, around)
        self._take(first.link)
        if first.link.bulk is not None:
            self.bulk = _BulkLink(first.link.bulk, self._detour)

    def _take(self, link: Link) -> None:
        self.lanes = link.lanes
        self.slice_bytes = link.slice_bytes
        self.slice_runs = link.slice_runs
        self.at_once = link.at_once
        self._first = link

    @property
    def first(self) -> Link:
        """The link of the segment's own path, for who wants more of it than every `Link` has."""
        return self._first

    @override
    def open_lane(self) -> Lane:
        lane = FailoverLane(self._first, self._detour)
        lane.open()
        return lane

    @override
    def close(self) -> None:
        self._detour.close()
        self._first.close()


class _BulkLink(FailoverLink):
    """The part for large batches. They take the same detour, which is the whole link's to close."""

    def __init__(self, first: Link, detour: Detour) -> None:
        self._detour = detour
        self._take(first)

    @override
    def close(self) -> None:
        self._first.close()


class Detour:
    """The other path, shared by a link's lanes. Safe to call from any thread."""

    def __init__(self, instead_of: str, around: Callable[[], Route] | None) -> None:
        self.instead_of = instead_of
        self._around = around
        self._lock = threading.Lock()  # guards all below
        self._openers: set[threading.Thread] = set()
        self._connection: Future[Route] | None = None  # the one there is, or is being made
        self._taken = False
        self._closed = False

    def open(self) -> Future[tuple[Route, Lane]]:
        """Begin to open a lane, after connecting if nobody has. Never waits.

        The lane is the caller's to close. Fails with `LaneError`, or with `PathUnavailable`, which
        gives each other path's reason.
        """
        opening: Future[tuple[Route, Lane]] = Future()
        if self._around is None:
            opening.set_exception(
                PathUnavailable(
                    "no other path is permitted (by strict_transport, or by the protocol asked for)"
                )
            )
            return opening
        thread = threading.Thread(
            target=self._open,
            args=(opening, self._around),
            name=f"mooncake detour of {self.instead_of}",
            daemon=True,
        )
        with self._lock:  # started under it: `close` joins no thread that never ran
            if self._closed:
                opening.set_exception(LaneError(Status.CANCELLED, "the link was closed"))
                return opening
            try:
                thread.start()
            except RuntimeError as error:  # the system has no more threads
                opening.set_exception(LaneError(Status.FAILED, f"cannot start a thread: {error}"))
                return opening
            self._openers.add(thread)
        return opening

    def taken(self, path: Path) -> None:
        """A slice goes this way; logs the first."""
        with self._lock:
            first, self._taken = not self._taken, True
        if first:
            _log.warning("transfers go on over %s, since %s", path.scheme, path.reason)

    def left(self) -> None:
        """A slice went the link's own path again; logs the first."""
        with self._lock:
            first, self._taken = self._taken, False
        if first:
            _log.warning("transfers go over %s again", self.instead_of)

    def close(self) -> None:
        """Open nothing any more, wait for what is being opened. The lanes must be closed."""
        with self._lock:
            self._closed = True
            openers, connection = list(self._openers), self._connection
        end = time.monotonic() + JOIN_S
        for opener in openers:
            opener.join(max(0.0, end - time.monotonic()))
            if opener.is_alive():
                _log.error("a %s did not end within %.0f s", opener.name, JOIN_S)
        if connection is not None:
            connection.add_done_callback(_close_connected)

    # Below: a thread that opens one lane.

    def _open(self, opening: Future[tuple[Route, Lane]], around: Callable[[], Route]) -> None:
        try:
            route = self._connected(around)
            opening.set_result((route, route.link.open_lane()))
        except Exception as error:  # noqa: BLE001 - raised again by the lane that waits
            opening.set_exception(error)
        finally:
            with self._lock:
                self._openers.discard(threading.current_thread())

    def _connected(self, around: Callable[[], Route]) -> Route:
        """The one connection. Whoever asks while another connects shares the outcome."""
        with self._lock:
            connection, ours = self._connection or Future(), self._connection is None
            self._connection = connection
        if ours:
            try:
                connection.set_result(around())
            except Exception as error:  # noqa: BLE001 - raised again below, for all who wait
                with self._lock:
                    self._connection = None  # the next slice may find the other path up
                connection.set_exception(error)
        return connection.result()


class FailoverLane(Lane):
    """A lane of the link's own path; beside it, while that is lost, one of the detour."""

    def __init__(self, first: Link, detour: Detour) -> None:
        self._link = first
        self._detour = detour
        self._changed = threading.Condition()  # guards the three below
        self._first: Lane | None = None
        self._second: tuple[Route, Lane] | None = None
        self._interrupted = False

    def open(self) -> None:
        """Open the first lane, or leave that to the first slice when the path is lost."""
        try:
            self._first = self._link.open_lane()
        except PathLost:
            self._first = None

    @override
    def move(self, piece: Slice, deadline: float) -> None:
        self.path = None
        try:
            lane = self._first or self._first_lane()
            lane.hurry = self.hurry
            lane.move(piece, deadline)
            self.moved_at = lane.moved_at
        except PathLost as lost:
            self._move_around(piece, deadline, lost)
        else:
            if self._second is not None:  # set by the thread that moves
                self._come_back()

    @override
    def interrupt(self) -> None:
        with self._changed:
            self._interrupted = True
            self._changed.notify_all()
            for lane in self._open_lanes():
                lane.interrupt()

    @override
    def close(self) -> None:
        for lane in self._open_lanes():
            lane.close()

    def _open_lanes(self) -> list[Lane]:
        lanes = (self._first, self._second and self._second[1])
        return [lane for lane in lanes if lane is not None]

    def _first_lane(self) -> Lane:
        lane = self._link.open_lane()
        with self._changed:
            self._first = lane
            if self._interrupted:  # while it opened; its `move` will raise
                lane.interrupt()
        return lane

    def _move_around(self, piece: Slice, deadline: float, lost: PathLost) -> None:
        reason = f"{self._detour.instead_of}: {lost}"
        route, lane = self._second or self._open_second(deadline, reason)
        scheme = route.path.scheme
        if piece.op not in route.capabilities.ops:
            raise PathLost(f"{reason}; and {scheme} cannot {piece.op}") from lost
        self.path = Path(scheme, reason)
        self.moved_at = 0.0
        self._detour.taken(self.path)
        try:
            for part in _cut(piece, route.link):
                lane.move(part, deadline)
        except LaneError as error:
            raise LaneError(error.status, f"{error} (over {scheme}, since {reason})") from error

    def _open_second(self, deadline: float, reason: str) -> tuple[Route, Lane]:
        opening = self._detour.open()
        opening.add_done_callback(self._wake)
        with self._changed:
            self._changed.wait_for(
                lambda: self._interrupted or opening.done(), deadline - time.monotonic()
            )
            if self._interrupted:
                failure = LaneError(Status.CANCELLED, "the lane was interrupted")
            elif not opening.done():
                failure = LaneError(
                    Status.TIMED_OUT, f"no other path opened by the deadline, needed since {reason}"
                )
            else:
                self._second = _opened(opening, reason)
                return self._second
        opening.add_done_callback(_close_opened)
        raise failure

    def _come_back(self) -> None:
        """The own path moves slices again: a lane kept for nothing costs the peer a thread."""
        with self._changed:
            second, self._second = self._second, None
        if second is not None:
            second[1].close()
            self._detour.left()

    def _wake(self, _opening: Future[tuple[Route, Lane]]) -> None:
        with self._changed:
            self._changed.notify_all()


def _cut(piece: Slice, link: Link) -> list[Slice]:
    """The slice in pieces for a link that takes smaller ones."""
    if piece.nbytes <= link.slice_bytes and piece.local.size <= link.slice_runs:
        return [piece]
    runs = slicing.Runs(piece.local, piece.remote, piece.lengths)
    return slicing.cut(piece.op, runs, piece.grant, link.slice_bytes, link.slice_runs)


def _opened(opening: Future[tuple[Route, Lane]], reason: str) -> tuple[Route, Lane]:
    try:
        return opening.result()
    except PathUnavailable as error:
        raise PathLost(f"{reason}; {error}") from error
    except LaneError as error:
        raise LaneError(error.status, f"{reason}; then {error}") from error


def _close_opened(opening: Future[tuple[Route, Lane]]) -> None:
    if opening.exception() is None:
        opening.result()[1].close()


def _close_connected(connection: Future[Route]) -> None:
    if connection.exception() is None:
        connection.result().link.close()
