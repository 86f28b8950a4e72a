"""One lane's slice on its way: how much is under way, and what came back failed."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from mooncake_engine.transport.rdma.endpoint import Endpoint
    from mooncake_engine.types import Uint64s


class Failed(NamedTuple):
    """Requests `rows` that an endpoint gave back; whether their bytes moved nobody knows."""

    rows: slice
    endpoint: Endpoint
    status: int  # ibv_wc_status


class Job:
    """Posted by a lane's thread, completed by whichever thread polls. Safe from any thread."""

    def __init__(self) -> None:
        self._ends = np.zeros(1, np.int64)
        self._changed = threading.Condition()  # guards all below
        self._woken = False
        self._failed: list[Failed] = []
        self.under_way = 0  # requests
        self.bytes_under_way = 0

    def begin(self, nbytes: Uint64s) -> None:
        """Take on requests of these sizes, shape (n,). Nothing may be under way."""
        self._ends = np.concatenate(([0], np.cumsum(nbytes))).astype(np.int64)

    def bytes_of(self, rows: slice) -> int:
        """Bytes of some of its requests."""
        return int(self._ends[rows.stop] - self._ends[rows.start])

    def within(self, rows: slice, nbytes: int) -> slice:
        """As many of the first of `rows` as have `nbytes` together; one at least."""
        limit = self._ends[rows.start] + nbytes
        stop = int(np.searchsorted(self._ends, limit, side="right")) - 1
        return slice(rows.start, max(rows.start + 1, min(rows.stop, stop)))

    def posted(self, rows: slice) -> None:
        """These are about to be posted."""
        with self._changed:
            self.under_way += rows.stop - rows.start
            self.bytes_under_way += self.bytes_of(rows)

    def returned(self, rows: slice, failed: Failed | None = None) -> None:
        """Nothing touches the memory of these any more; they moved unless they are in `failed`."""
        with self._changed:
            self.under_way -= rows.stop - rows.start
            self.bytes_under_way -= self.bytes_of(rows)
            if failed is not None:
                self._failed.append(failed)
            self._wake()

    def wake(self) -> None:
        """Something else changed: an interrupt, an endpoint, room in a queue."""
        with self._changed:
            self._wake()

    def _wake(self) -> None:
        self._woken = True
        self._changed.notify_all()

    @property
    def woken(self) -> bool:
        """Whether something changed since `wait` last returned."""
        return self._woken

    @property
    def quiet(self) -> bool:
        """Nothing is under way and nothing has failed."""
        with self._changed:
            return not self.under_way and not self._failed

    def take_failed(self) -> list[Failed]:
        """What failed since the last call."""
        with self._changed:
            failed, self._failed = self._failed, []
            return failed

    def wait(self, until: float) -> None:
        """Block until something changes, at most until the monotonic second `until`."""
        with self._changed:
            while not self._woken and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            self._woken = False
