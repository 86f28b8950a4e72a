"""The threads that drive one link's lanes: slices in, ended batches out.

Each thread owns one lane at a time and takes one slice at a time, round robin over the link's
batches, so that a small batch does not wait behind a big one. Threads start when slices wait and
end when they were idle for `idle_s`.

A caller that waits for its batch anyway borrows the lane of an idle thread and moves slices
itself: to hand one over and be woken again takes two wake-ups of 20 to 50 us each, 4 KiB take 5.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

import msgspec

from mooncake_engine.batch import Failure
from mooncake_engine.errors import LaneError
from mooncake_engine.hands import Hand, IdleHands
from mooncake_engine.types import Path, Status

if TYPE_CHECKING:
    from mooncake_engine.batch import Batch
    from mooncake_engine.transport.base import Link
    from mooncake_engine.types import Slice

_log = logging.getLogger(__name__)

#: Idle lanes are closed after this: a reconnect costs about 1 ms, an idle lane costs the peer a
#: thread.
IDLE_S = 30.0
#: `close` waits this long for lanes: an interrupted move returns within 100 ms, a connect within
#: its time-out (5 s by default).
JOIN_S = 10.0
#: A peer that refuses one more lane is not asked at every submit.
HIRE_AGAIN_S = 5.0

_INTERRUPTED = Failure(Status.CANCELLED, "the caller was interrupted")


class Moved(msgspec.Struct, frozen=True):
    """What became of a slice that was no batch's."""

    failure: Failure | None
    path: Path | None  # `Lane.path`
    at: float  # when its last byte was in place, `time.monotonic()`


class LinkWorker:
    """Moves batches over one link. Safe to call from any thread."""

    def __init__(self, link: Link, name: str, *, idle_s: float = IDLE_S) -> None:
        """Args: name: what the threads are called, e.g. "tcp to host:15001"."""
        self.link = link
        self._name = name
        self._idle_s = idle_s
        self._lock = threading.Lock()  # guards all below and the progress of every batch here
        self._ready: deque[Batch] = deque()  # batches with waiting slices
        self._waiting = 0  # slices in _ready
        self._hands: set[Hand] = set()
        self._idle = IdleHands()
        self._hire_again_at = 0.0
        #: Why it takes no more batches.
        self.closed: Failure | None = None

    def submit(self, batch: Batch) -> None:
        """Queue a batch that has slices. Never waits for a lane."""
        with self._lock:
            finished = self._queue(batch)
        self._finish(finished)

    def transfer(self, batch: Batch) -> None:
        """Move slices of this batch on the calling thread, as far as a lane is idle for that.

        Returns when there is none left to take. The batch may go on: lanes' own threads share its
        slices, and have all of them where no lane was idle, or where other batches wait too.
        """
        with self._lock:
            hand = None if self.closed is not None or self._ready else self._idle.borrow()
            piece = None if hand is None else self._assign(hand, batch)
            finished = self._queue(batch)
        self._finish(finished)
        while hand is not None and piece is not None:
            failure: Failure | None = _INTERRUPTED
            try:
                failure = self._move(hand, piece, batch.deadline)
            finally:  # also when a signal's handler raises: by then the lane has let go
                with self._lock:
                    finished = self._settle(hand, batch, failure)
                    piece = self._another(hand, batch)
                self._finish(finished)

    def borrow(self) -> Hand | None:
        """An idle lane for one slice that is no batch's, unless batches wait; `move_alone` uses it.

        What a batch costs is as much again as to move 4 KiB over loopback.
        """
        with self._lock:
            if self.closed is not None or self._ready:
                return None
            hand = self._idle.borrow()
            if hand is not None:
                hand.alone = True
            return hand

    def move_alone(self, hand: Hand, piece: Slice, deadline: float) -> Moved:
        """Move the slice on the calling thread and give the lane back."""
        failure: Failure | None = _INTERRUPTED
        path, moved_at = None, 0.0
        try:
            failure = self._move(hand, piece, deadline)
        finally:  # also when a signal's handler raises: by then the lane has let go
            with self._lock:
                hand.alone = False
                if hand.lane is not None:
                    path, moved_at = hand.lane.path, hand.lane.moved_at
                if failure is not None:
                    failure = self.closed or failure
                    hand.spent |= failure.status is not Status.REFUSED
                self._give_back(hand)
        return Moved(failure, path, moved_at or time.monotonic())

    def stop(self, batch: Batch, failure: Failure) -> None:
        """End a batch early: drop what waits, interrupt the lanes that move its slices.

        Returns at once. The batch ends when the last of those lanes returned. No effect on an
        ended batch.
        """
        with self._lock:
            finished = [batch] if self._stop(batch, failure) else []
        self._finish(finished)

    def stop_all(self, failure: Failure) -> None:
        """Take no more batches and end those under way. Returns at once; idempotent."""
        with self._lock:
            self.closed = self.closed or failure
            moving = {hand.batch for hand in self._hands if hand.batch is not None}
            finished = [batch for batch in {*self._ready, *moving} if self._stop(batch, failure)]
            for hand in self._hands:
                if hand.alone:
                    self._interrupt(hand)
                hand.call()
        self._finish(finished)

    def close(self, failure: Failure) -> None:
        """End every batch with `failure`, then threads, lanes and link. Blocks; idempotent."""
        self.stop_all(failure)
        with self._lock:
            hands = list(self._hands)
        end = time.monotonic() + JOIN_S
        for hand in hands:
            if hand.thread is threading.current_thread():
                continue  # closed from a done callback: this thread ends when that returns
            hand.thread.join(max(0.0, end - time.monotonic()))
            if hand.thread.is_alive():
                _log.error("a lane of %s did not return within %.0f s", self._name, JOIN_S)
        self.link.close()

    @staticmethod
    def _finish(batches: list[Batch]) -> None:
        """End batches, outside the lock: their callbacks may submit or cancel."""
        for batch in batches:
            batch.finish(batch.progress.failure)

    # Below: called with the lock held.

    def _stop(self, batch: Batch, failure: Failure) -> bool:
        """True: nothing of the batch moves and the caller must finish it."""
        dropped = batch.progress.waiting
        finished = batch.progress.stop(failure)
        if dropped:
            self._waiting -= dropped
            if batch in self._ready:
                self._ready.remove(batch)
        for hand in self._hands:
            # Under the lock, else the lane might have gone on to another batch meanwhile.
            if hand.batch is batch:
                self._interrupt(hand)
        return finished

    @staticmethod
    def _interrupt(hand: Hand) -> None:
        if hand.lane is not None and not hand.spent:
            hand.spent = True
            hand.lane.interrupt()

    def _stop_queued(self, failure: Failure) -> list[Batch]:
        return [batch for batch in tuple(self._ready) if self._stop(batch, failure)]

    def _hire(self) -> list[Batch]:
        """Start threads for waiting slices; returns batches to finish when none can start."""
        missing = min(self._waiting - len(self._idle), self.link.lanes - len(self._hands))
        if self._hands and time.monotonic() < self._hire_again_at:
            return []
        for _ in range(missing):
            hand = Hand(self._lock)
            hand.thread = threading.Thread(
                target=self._run, args=(hand,), name=f"mooncake {self._name}", daemon=True
            )
            try:
                hand.thread.start()
            except RuntimeError as error:  # the system has no more threads
                if self._hands:
                    return []
                return self._stop_queued(Failure(Status.FAILED, f"cannot start a thread: {error}"))
            self._hands.add(hand)
        return []

    def _await_work(self, hand: Hand) -> bool:
        """Wait for a waiting slice. False: idle for too long, closed, or the lane is spent."""

        def wanted() -> bool:
            return bool(self._ready) or self.closed is not None or hand.spent

        return (
            self._idle.wait(hand, wanted, self._idle_s) and self.closed is None and not hand.spent
        )

    def _queue(self, batch: Batch) -> list[Batch]:
        """Let threads move the waiting slices; returns batches to finish when none can."""
        if self.closed is not None:
            return [batch] if batch.progress.stop(self.closed) else []
        if not batch.progress.waiting:
            return []
        self._ready.append(batch)
        self._waiting += batch.progress.waiting
        self._idle.call(batch.progress.waiting)
        return self._hire()

    def _next(self, hand: Hand) -> tuple[Batch, Slice]:
        """The first slice of the batch whose turn it is; `hand` moves it."""
        batch = self._ready.popleft()
        piece = self._assign(hand, batch)
        self._waiting -= 1
        if batch.progress.waiting:
            self._ready.append(batch)
        return batch, piece

    def _another(self, hand: Hand, batch: Batch) -> Slice | None:
        """One more slice for a caller, unless others wait for lanes: then its thread goes on."""
        if not hand.spent and len(self._ready) == 1 and self._ready[0] is batch:
            return self._next(hand)[1]
        self._give_back(hand)
        return None

    def _give_back(self, hand: Hand) -> None:
        """Of a lane that was borrowed. Its thread looks if there is something for it to do."""
        self._idle.give_back(hand)
        if self._ready or self.closed is not None or hand.spent:
            hand.call()

    @staticmethod
    def _assign(hand: Hand, batch: Batch) -> Slice:
        if batch.first_taken is None:
            batch.first_taken = time.monotonic()
        hand.batch = batch
        return batch.progress.take()

    def _settle(self, hand: Hand, batch: Batch, failure: Failure | None) -> list[Batch]:
        """The hand's lane let go of its slice; returns the batch when that ends it."""
        hand.batch = None
        if hand.lane is not None:
            batch.path = hand.lane.path or batch.path
            batch.moved_at = max(batch.moved_at, hand.lane.moved_at or time.monotonic())
        if failure is not None:
            # Only a refusal leaves both ends of a lane in step; after the rest it is unusable.
            hand.spent |= failure.status is not Status.REFUSED
            if batch.progress.waiting:
                self._waiting -= batch.progress.waiting
                self._ready.remove(batch)
        return [batch] if batch.progress.returned(failure) else []

    # Below: one thread's life.

    def _run(self, hand: Hand) -> None:
        while True:
            with self._lock:
                if not self._await_work(hand):
                    self._hands.discard(hand)
                    return
            failure = self._open(hand)
            if failure is not None:
                self._give_up(hand, failure)
                return
            try:
                while (job := self._take(hand)) is not None:
                    failure = self._move(hand, job[1], job[0].deadline)
                    with self._lock:
                        finished = self._settle(hand, job[0], failure)
                    self._finish(finished)
            finally:
                self._drop_lane(hand)

    def _open(self, hand: Hand) -> Failure | None:
        try:
            lane = self.link.open_lane()
        except LaneError as error:
            return Failure(error.status, str(error))
        except Exception as error:  # noqa: BLE001 - a bug in a transport must not end this thread
            _log.exception("opening a lane of %s failed unexpectedly", self._name)
            return Failure(Status.FAILED, f"opening a lane of {self._name} failed: {error!r}")
        with self._lock:
            hand.lane, hand.spent = lane, False
        return None

    def _give_up(self, hand: Hand, failure: Failure) -> None:
        """This thread got no lane. The last one without a lane fails what is queued."""
        with self._lock:
            self._hands.discard(hand)
            if self._hands:  # they have lanes, or will give up themselves
                self._hire_again_at = time.monotonic() + HIRE_AGAIN_S
                return
            finished = self._stop_queued(failure)
        self._finish(finished)

    def _take(self, hand: Hand) -> tuple[Batch, Slice] | None:
        """Wait for a slice. None: the lane is spent, was idle for too long, or we are closed."""
        with self._lock:
            return self._next(hand) if self._await_work(hand) else None

    def _drop_lane(self, hand: Hand) -> None:
        with self._lock:
            lane, hand.lane = hand.lane, None
            hand.spent = False
        if lane is not None:
            try:
                lane.close()
            except Exception:  # noqa: BLE001 - a bug in a transport must not end this thread
                _log.exception("closing a lane of %s failed", self._name)

    # Below: a hand's thread, or a caller that borrowed its lane.

    def _move(self, hand: Hand, piece: Slice, deadline: float) -> Failure | None:
        lane = hand.lane
        if lane is None:
            raise AssertionError(f"a hand of {self._name} was given a slice and has no lane")
        try:
            lane.move(piece, deadline)
        except LaneError as error:
            return Failure(error.status, str(error))
        except Exception as error:  # noqa: BLE001 - a bug in a transport must not end this thread
            _log.exception("a lane of %s failed unexpectedly", self._name)
            return Failure(Status.FAILED, f"moving over {self._name} failed: {error!r}")
        return None
