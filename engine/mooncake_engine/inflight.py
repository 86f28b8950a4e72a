"""The batches under way of one engine, and the thread that ends those whose time is up."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mooncake_engine.batch import Batch
    from mooncake_engine.prepared import PreparedTransfer
    from mooncake_engine.types import Region

#: How long `close` waits for the deadline thread, which never blocks on anything but its lock.
JOIN_S = 5.0


class InFlight:
    """Batches from submit to completion. Safe to call from any thread.

    Lanes give up at the deadline by themselves; the thread here also ends batches that wait for a
    lane, and does not trust a transport to look at the clock.
    """

    def __init__(self) -> None:
        #: Guards all below. Re-entrant, so that a caller may hold it over a check and an `add`.
        self.lock = threading.RLock()
        self._changed = threading.Condition(self.lock)
        self._batches: set[Batch] = set()
        self._late: set[Batch] = set()  # those of them that were told so
        self._alone: dict[PreparedTransfer, int] = {}  # how many runs that are no batch
        self._thread: threading.Thread | None = None
        self._wakes_at = float("inf")
        self._closed = False

    def add(self, batch: Batch) -> None:
        """Keep the batch and watch its deadline."""
        with self.lock:
            if self._thread is None:
                thread = threading.Thread(
                    target=self._watch, name="mooncake deadlines", daemon=True
                )
                thread.start()
                self._thread = thread
            self._batches.add(batch)
            if batch.deadline < self._wakes_at:
                # Rare with one time-out for all: later batches have later deadlines.
                self._wakes_at = batch.deadline
                self._changed.notify()

    def discard(self, batch: Batch) -> None:
        """The batch ended."""
        with self.lock:
            self._batches.discard(batch)
            if self._late:
                self._late.discard(batch)

    def enter(self, transfer: PreparedTransfer) -> None:
        """It moves its one slice by a lane, which looks at the deadline; no batch is made of it.

        With the lock, as `leave`.
        """
        self._alone[transfer] = self._alone.get(transfer, 0) + 1

    def leave(self, transfer: PreparedTransfer) -> None:
        """That has ended."""
        left = self._alone[transfer] - 1
        if left:
            self._alone[transfer] = left
        else:
            del self._alone[transfer]

    def touching(self, region: Region) -> Batch | PreparedTransfer | None:
        """What uses local memory of `region`, or None."""
        first, end = np.uint64(region.address), np.uint64(region.address + region.length)
        with self.lock:
            users: list[Batch | PreparedTransfer] = [*self._batches, *self._alone]
            for user in users:
                local, _, lengths = user.plan.runs
                if ((local < end) & (local + lengths > first)).any():
                    return user
        return None

    def close(self) -> None:
        """Stop the thread. The batches must have ended. Idempotent."""
        with self.lock:
            self._closed = True
            self._changed.notify()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(JOIN_S)

    def _watch(self) -> None:
        while True:
            with self.lock:
                if self._closed:
                    return
                now = time.monotonic()
                watched = self._batches - self._late
                late = {batch for batch in watched if batch.deadline <= now}
                self._late |= late
                if not late:
                    # Who woke it for a batch that has ended meanwhile need not do so for the next:
                    # it sleeps until that one's time, and then, if there is none, until `add`.
                    if watched:
                        self._wakes_at = min(batch.deadline for batch in watched)
                    elif self._wakes_at <= now:
                        self._wakes_at = float("inf")  # TIMEOUT_MAX is 292 years
                    self._changed.wait(min(self._wakes_at - now, threading.TIMEOUT_MAX))
                    continue
            for batch in late:  # outside the lock: ending a batch runs callbacks
                batch.expire()
