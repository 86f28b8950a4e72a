"""Where large batches go when their link gets no lane of its own: a segment's other lanes."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

from typing_extensions import override

from mooncake_engine import slicing
from mooncake_engine.batch import Batch
from mooncake_engine.errors import LaneError
from mooncake_engine.transport.base import Lane, Link
from mooncake_engine.types import Path, Status

if TYPE_CHECKING:
    from mooncake_engine.types import Completion, Slice
    from mooncake_engine.worker import LinkWorker

_log = logging.getLogger(__name__)

#: A peer that serves no more lanes is not asked at every slice.
TRY_AGAIN_S = 5.0


class LendingLink(Link):
    """A bulk link that never fails for want of lanes."""

    def __init__(self, link: Link, other: LinkWorker) -> None:
        """Args: other: of the same segment, lends its lanes."""
        self.lanes = link.lanes
        self.slice_bytes = link.slice_bytes
        self.slice_runs = link.slice_runs
        self._link = link
        self._other = other

    @override
    def open_lane(self) -> Lane:
        return LentLane(self._link, self._other)

    @override
    def close(self) -> None:
        self._link.close()


class LentLane(Lane):
    """A lane of a bulk link; or, while that cannot be had, what another worker's lanes can do.

    A peer serves so many lanes and no more. Whoever comes late has one for small batches, and a
    large one takes longer over it, which is better than failing.
    """

    def __init__(self, link: Link, other: LinkWorker) -> None:
        self._link = link
        self._other = other
        self._lock = threading.Lock()  # guards all below
        self._lane: Lane | None = None
        self._batch: Batch | None = None
        self._interrupted = False
        self._again_at = 0.0
        self._try()

    @override
    def move(self, piece: Slice, deadline: float) -> None:
        if self._lane is None and time.monotonic() >= self._again_at:
            self._try()
        if self._lane is not None:
            self._lane.hurry = self.hurry
            self._lane.move(piece, deadline)
            self.path, self.moved_at = self._lane.path, self._lane.moved_at
        else:
            self._move_by_the_other(piece, deadline)

    @override
    def interrupt(self) -> None:
        with self._lock:
            self._interrupted = True
            if self._lane is not None:
                self._lane.interrupt()
            if self._batch is not None:
                self._batch.cancel()

    @override
    def close(self) -> None:
        if self._lane is not None:
            self._lane.close()

    def _try(self) -> None:
        try:
            lane = self._link.open_lane()
        except LaneError as failure:
            if not self._again_at:
                _log.warning("large transfers share the lanes of small ones: %s", failure)
            self._again_at = time.monotonic() + TRY_AGAIN_S
            return
        with self._lock:
            self._lane = lane
            if self._interrupted:
                lane.interrupt()

    def _move_by_the_other(self, piece: Slice, deadline: float) -> None:
        self.moved_at = 0.0
        link = self._other.link
        runs = slicing.Runs(piece.local, piece.remote, piece.lengths)
        how = piece.grant, link.slice_bytes, link.slice_runs, link.lanes
        slices = slicing.cut(piece.op, runs, *how)
        plan = slicing.Plan(piece.op, runs, slices, piece.nbytes, runs.lengths.size)
        left = max(deadline - time.monotonic(), 0.001)
        batch = Batch(plan, Path("", ""), left, self._other.stop, _nobody_asks)
        with self._lock:
            if self._interrupted:
                raise LaneError(Status.CANCELLED, "the lane was interrupted")
            self._batch = batch
        self._other.submit(batch)
        end = batch.wait()
        with self._lock:
            self._batch = None
        self.path = end.path if end.path.scheme else None
        if not end.ok:
            raise LaneError(end.status, end.error)


def _nobody_asks(_batch: Batch, _end: Completion) -> None:
    """The batch that this one is part of is counted."""
