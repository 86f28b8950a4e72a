"""A transfer that is worked out once and run any number of times, and what every run looks up.

To check, merge and cut 16 runs takes about as long as to move them (4 KiB each, shared memory), and
who moves the same pages again and again need not pay for it again. A transfer that is not prepared
is one that runs once.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from typing_extensions import override

from mooncake_engine import slicing
from mooncake_engine.batch import Batch
from mooncake_engine.errors import (
    EngineClosed,
    InvalidTransfer,
    MetadataError,
    OutOfBounds,
    UnknownSegment,
)
from mooncake_engine.inflight import InFlight
from mooncake_engine.stats import Counters
from mooncake_engine.types import Completion, Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from mooncake_engine.memory import Bounds, RegionTable
    from mooncake_engine.segment import Segment
    from mooncake_engine.stats import Key, Totals
    from mooncake_engine.types import Op, SegmentRecord, Slice
    from mooncake_engine.worker import Moved


class Office:
    """What an engine's transfers share: who may start, what is under way, what has ended."""

    def __init__(
        self, regions: RegionTable, timeout_s: float, look_up: Callable[[str], SegmentRecord]
    ) -> None:
        """Args: timeout_s: of runs that give none; look_up: a peer's record in the store, by name.

        `inflight` is to be closed when no batch is left.
        """
        self.regions = regions
        self.timeout_s = timeout_s
        self.look_up = look_up
        self.inflight = InFlight()
        self.counters = Counters()  # guarded by the lock of `inflight`
        self.closed = False

    def close(self) -> None:
        """Start nothing any more. Idempotent."""
        with self.inflight.lock:
            self.closed = True

    def check_open(self) -> None:
        """Raise `EngineClosed` after `close`."""
        if self.closed:
            raise EngineClosed("the engine was closed; make a new one")

    def ended(self, batch: Batch, completion: Completion) -> None:
        """A batch is under way no more."""
        with self.inflight.lock:
            self.inflight.discard(batch)
            self.count(batch.op, completion)

    def count(self, op: Op, end: Completion) -> None:
        """Something ended; with the lock of `inflight`."""
        self.counters.tally(end.path.scheme, op, end.status).add(end)

    def statistics(self) -> dict[Key, Totals]:
        """Of the batches that have ended."""
        with self.inflight.lock:
            return self.counters.snapshot()

    def check_remote(self, segment: Segment, runs: slicing.Runs) -> None:
        """Raise `OutOfBounds` unless the peer registered each run; looks at the store before."""
        try:
            segment.check(runs.remote, runs.lengths)
        except OutOfBounds as error:
            try:
                record = self.look_up(segment.name)
            except (UnknownSegment, MetadataError):
                raise error from None  # the first error is the one that the caller can act on
            if record.incarnation != segment.incarnation:
                raise OutOfBounds(
                    f"{error}; {segment.name} was restarted meanwhile, open the segment again"
                ) from None
            segment.update(record)
            segment.check(runs.remote, runs.lengths)


class PreparedTransfer:
    """The same runs between the same two places; made by `TransferEngine.prepare`.

    Each run is a transfer of its own: checked against what is registered by then, with its own
    deadline and its own completion. It may run on several threads at once, and holds neither memory
    nor lanes in between; it need not be closed.
    """

    def __init__(
        self, office: Office, segment: Segment, op: Op, given: slicing.Runs, grant: bytes
    ) -> None:
        """Raises `InvalidTransfer` and `OutOfBounds` as `TransferEngine.submit` does."""
        self._office = office
        self._segment = segment
        # Bounds, once passed, hold until there are others. Taken before the check: a change that
        # comes meanwhile is then one that the next run sees.
        self._theirs: Bounds = segment.bounds
        office.check_remote(segment, given)
        runs = slicing.merge(op, given)
        nbytes = slicing.total(runs.lengths)
        self._worker = segment.worker(nbytes)
        link = self._worker.link
        slices = slicing.cut(op, runs, grant, link.slice_bytes, link.slice_runs, link.lanes)
        self.plan = slicing.Plan(op, runs, slices, nbytes, given.lengths.size)
        #: The only slice, if there is only one.
        self._alone = slices[0] if len(slices) == 1 else None
        self._runs = runs.lengths.size
        self._tally = office.counters.tally(segment.path.scheme, op, Status.OK)
        self._ours = office.regions.bounds
        self._ours.check(runs.local, runs.lengths, "this engine")

    @override
    def __repr__(self) -> str:
        plan = self.plan
        return f"<PreparedTransfer {plan.op} {plan.nbytes} bytes of {self._segment.name}>"

    def submit(self, timeout: float | None = None) -> Batch:
        """Start a run; as `TransferEngine.submit`, whose errors it raises."""
        at_once = self._worker.link.at_once
        if at_once and self._alone and (end := self._at_once(at_once, self._alone, timeout)):
            return self._batch(self._office.timeout_s).ended(end)
        batch = self._start(timeout)
        if self.plan.slices:
            self._worker.submit(batch)
        else:
            batch.finish(None)
        return batch

    def transfer(self, timeout: float | None = None) -> Completion:
        """Run and wait; as `TransferEngine.transfer`."""
        if piece := self._alone:
            at_once = self._worker.link.at_once
            end = (
                self._at_once(at_once, piece, timeout) if at_once else self._by_lane(piece, timeout)
            )
            if end:
                return end
        batch = self._start(timeout)
        if self.plan.slices:
            self._worker.transfer(batch)
        else:
            batch.finish(None)
        return batch.wait()

    # A transfer of one slice that can be moved right now is no batch: to make one and to keep its
    # books costs more than to copy 4 KiB. Where that cannot be, or something has changed since the
    # last run, both return None, and it goes the long way.

    def _at_once(
        self, move: Callable[[Slice], bool], piece: Slice, timeout: float | None
    ) -> Completion | None:
        """Without a lane. Nothing waits; so no unregister and no close comes in between."""
        began = time.monotonic()
        with self._office.inflight.lock:
            if self._has_changed(timeout) or not move(piece):
                return None
            return self._moved(time.monotonic() - began)

    def _by_lane(self, piece: Slice, timeout: float | None) -> Completion | None:
        """By an idle lane, which looks at the deadline itself."""
        began = time.monotonic()
        inflight = self._office.inflight
        with inflight.lock:
            hand = None if self._has_changed(timeout) else self._worker.borrow()
            if hand is None:
                return None
            inflight.enter(self)
        moved = None
        try:
            deadline = began + (self._office.timeout_s if timeout is None else timeout)
            moved = self._worker.move_alone(hand, piece, deadline)
        finally:
            with inflight.lock:
                inflight.leave(self)
                end = self._ended(began, moved) if moved else None
        return end

    def _has_changed(self, timeout: float | None) -> bool:
        """What the long way looks at, and says what is wrong with it."""
        return (
            self._office.closed
            or self._segment.bounds is not self._theirs
            or self._office.regions.bounds is not self._ours
            or self._worker.closed is not None
            or (timeout is not None and not 0 < timeout < threading.TIMEOUT_MAX)
        )

    # With the lock of `inflight`, which also guards the tallies.

    def _moved(self, seconds: float) -> Completion:
        """All of it, by the segment's own path. Kept short: a microsecond is much of it."""
        plan = self.plan
        end = Completion(
            status=Status.OK,
            nbytes=plan.nbytes,
            path=self._segment.path,
            descriptors=plan.descriptors,
            runs=self._runs,
            queued_s=0.0,
            total_s=seconds,
        )
        self._tally.add(end)
        return end

    def _ended(self, began: float, moved: Moved) -> Completion:
        failure, path, seconds = moved.failure, moved.path, moved.at - began
        if not (failure or path):
            return self._moved(seconds)
        plan = self.plan
        end = Completion(
            status=failure.status if failure else Status.OK,
            error=failure.error if failure else "",
            nbytes=plan.nbytes,
            path=path or self._segment.path,
            descriptors=plan.descriptors,
            runs=self._runs,
            queued_s=0.0,
            total_s=seconds,
        )
        self._office.count(plan.op, end)
        return end

    def _start(self, timeout: float | None) -> Batch:
        """A batch that is in flight, and not on its way yet."""
        office = self._office
        batch = self._batch(self._check(timeout))
        with office.inflight.lock:  # no unregister and no close between the look and the `add`
            self._check_own()
            office.inflight.add(batch)
        return batch

    def _batch(self, timeout: float) -> Batch:
        return Batch(self.plan, self._segment.path, timeout, self._worker.stop, self._office.ended)

    def _check(self, timeout: float | None) -> float:
        """May it run, as far as the peer's memory goes? Returns the seconds that it has."""
        if timeout is None:
            timeout = self._office.timeout_s
        if not 0 < timeout < threading.TIMEOUT_MAX:
            raise InvalidTransfer(f"a transfer cannot have {timeout} s; give more than 0")
        theirs = self._segment.bounds
        if theirs is not self._theirs:
            self._office.check_remote(self._segment, self.plan.runs)
            self._theirs = theirs
        return timeout

    def _check_own(self) -> None:
        """May it run, as far as our memory goes? With the lock of `inflight`."""
        self._office.check_open()
        ours = self._office.regions.bounds
        if ours is not self._ours:
            runs = self.plan.runs
            ours.check(runs.local, runs.lengths, "this engine")
            self._ours = ours
