"""A transfer that is worked out once and run any number of times, and what every run looks up.

To check, merge and cut 16 runs takes about as long as to move them (4 KiB each, shared memory), and
who moves the same pages again and again need not pay for it again. A transfer that is not prepared
is one that runs once.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, NamedTuple

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
    from mooncake_engine.stats import Key, Tally, Totals
    from mooncake_engine.types import Op, SegmentRecord, Slice


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
            tally = self.counters.tally(completion.path.scheme, batch.op, completion.status)
            tally.add(completion)

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


class Alone(NamedTuple):
    """The only slice of a transfer that needs no lane."""

    move: Callable[[Slice], bool]
    piece: Slice
    runs: int
    tally: Tally


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
        self._plan = slicing.Plan(op, runs, slices, nbytes, given.lengths.size)
        self._alone: Alone | None = None
        if link.at_once and len(slices) == 1:
            tally = office.counters.tally(segment.path.scheme, op, Status.OK)
            self._alone = Alone(link.at_once, slices[0], runs.lengths.size, tally)
        self._ours = office.regions.bounds
        self._ours.check(runs.local, runs.lengths, "this engine")

    @override
    def __repr__(self) -> str:
        plan = self._plan
        return f"<PreparedTransfer {plan.op} {plan.nbytes} bytes of {self._segment.name}>"

    def submit(self, timeout: float | None = None) -> Batch:
        """Start a run; as `TransferEngine.submit`, whose errors it raises."""
        if self._alone and (end := self._at_once(self._alone, timeout)):
            return self._batch(self._office.timeout_s).ended(end)
        batch = self._start(timeout)
        if self._plan.slices:
            self._worker.submit(batch)
        else:
            batch.finish(None)
        return batch

    def transfer(self, timeout: float | None = None) -> Completion:
        """Run and wait; as `TransferEngine.transfer`."""
        if self._alone and (end := self._at_once(self._alone, timeout)):
            return end
        batch = self._start(timeout)
        if self._plan.slices:
            self._worker.transfer(batch)
        else:
            batch.finish(None)
        return batch.wait()

    def _at_once(self, alone: Alone, timeout: float | None) -> Completion | None:
        """Run without a batch, which costs as much as to copy 4 KiB. None: go the long way.

        As nothing waits, there is nothing to time out or to cancel, and no unregister and no close
        comes in between.
        """
        office, segment = self._office, self._segment
        began = time.monotonic()
        with office.inflight.lock:
            if (
                office.closed
                or segment.bounds is not self._theirs
                or office.regions.bounds is not self._ours
                or self._worker.closed
                or (timeout is not None and timeout <= 0)
                or not alone.move(alone.piece)
            ):
                return None
            plan = self._plan
            end = Completion(
                status=Status.OK,
                nbytes=plan.nbytes,
                path=segment.path,
                descriptors=plan.descriptors,
                runs=alone.runs,
                queued_s=0.0,
                total_s=time.monotonic() - began,
            )
            alone.tally.add(end)
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
        return Batch(self._plan, self._segment.path, timeout, self._worker.stop, self._office.ended)

    def _check(self, timeout: float | None) -> float:
        """May it run, as far as the peer's memory goes? Returns the seconds that it has."""
        if timeout is None:
            timeout = self._office.timeout_s
        if not 0 < timeout < threading.TIMEOUT_MAX:
            raise InvalidTransfer(f"a transfer cannot have {timeout} s; give more than 0")
        theirs = self._segment.bounds
        if theirs is not self._theirs:
            self._office.check_remote(self._segment, self._plan.runs)
            self._theirs = theirs
        return timeout

    def _check_own(self) -> None:
        """May it run, as far as our memory goes? With the lock of `inflight`."""
        self._office.check_open()
        ours = self._office.regions.bounds
        if ours is not self._ours:
            runs = self._plan.runs
            ours.check(runs.local, runs.lengths, "this engine")
            self._ours = ours
