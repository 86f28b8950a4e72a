"""A transfer that is worked out once and run any number of times, and what every run looks up.

To check, merge and cut 16 runs takes about as long as to move them (4 KiB each, shared memory), and
who moves the same pages again and again need not pay for it again. A transfer that is not prepared
is one that runs once.
"""

from __future__ import annotations

import threading
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

if TYPE_CHECKING:
    from collections.abc import Callable

    from mooncake_engine.memory import Bounds, RegionTable
    from mooncake_engine.segment import Segment
    from mooncake_engine.types import Completion, Op, SegmentRecord


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
        self.counters = Counters()
        self._closed = False

    def close(self) -> None:
        """Start nothing any more. Idempotent."""
        with self.inflight.lock:
            self._closed = True

    def check_open(self) -> None:
        """Raise `EngineClosed` after `close`."""
        if self._closed:
            raise EngineClosed("the engine was closed; make a new one")

    def ended(self, batch: Batch, completion: Completion) -> None:
        """A batch is under way no more."""
        self.inflight.discard(batch)
        self.counters.count(batch.op, completion)

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
        self._ours: Bounds | None = None
        link = segment.link
        self._plan = slicing.plan(op, given, grant, link.slice_bytes, link.lanes)

    @override
    def __repr__(self) -> str:
        plan = self._plan
        return f"<PreparedTransfer {plan.op} {plan.nbytes} bytes of {self._segment.name}>"

    def submit(self, timeout: float | None = None) -> Batch:
        """Start a run; as `TransferEngine.submit`, whose errors it raises."""
        batch = self._start(timeout)
        if self._plan.slices:
            self._segment.worker.submit(batch)
        else:
            batch.finish(None)
        return batch

    def transfer(self, timeout: float | None = None) -> Completion:
        """Run and wait; as `TransferEngine.transfer`."""
        batch = self._start(timeout)
        if self._plan.slices:
            self._segment.worker.transfer(batch)
        else:
            batch.finish(None)
        return batch.wait()

    def _start(self, timeout: float | None) -> Batch:
        """A batch that is in flight, and not on its way yet."""
        office, segment, runs = self._office, self._segment, self._plan.runs
        if timeout is None:
            timeout = office.timeout_s
        if not 0 < timeout < threading.TIMEOUT_MAX:
            raise InvalidTransfer(f"a transfer cannot have {timeout} s; give more than 0")
        theirs = segment.bounds
        if theirs is not self._theirs:
            office.check_remote(segment, runs)
            self._theirs = theirs
        batch = Batch(self._plan, segment.path, timeout, segment.worker.stop, office.ended)
        with office.inflight.lock:  # no unregister and no close between the look and the `add`
            office.check_open()
            ours = office.regions.bounds
            if ours is not self._ours:
                ours.check(runs.local, runs.lengths, "this engine")
                self._ours = ours
            office.inflight.add(batch)
        return batch
