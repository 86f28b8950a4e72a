"""The sending half of a queue pair: chains posted, and whose they are when they complete.

Requests of one queue pair complete in order, and only every n-th says so: one completion stands
for all before it. After an error every request that was under way completes, as flushed; its
chain goes back to its job then, and not before: until then the NIC may touch its memory.
"""

from __future__ import annotations

import errno
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from typing_extensions import override

from mooncake_engine.transport.rdma.completions import Completions, Owner
from mooncake_engine.transport.rdma.job import Failed
from mooncake_engine.transport.rdma.verbs.base import Opcode, VerbsError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from mooncake_engine.transport.rdma.endpoint import Endpoint
    from mooncake_engine.transport.rdma.job import Job
    from mooncake_engine.transport.rdma.verbs.base import QueuePair, Work

#: Requests between two visible completions: each costs a microsecond of Python, and what they
#: stand for is free again only then.
SIGNAL_EVERY = 16
FLUSHED = 5  # IBV_WC_WR_FLUSH_ERR


class _Chain:
    """Requests first..last (ids) are rows from `row` on of a job."""

    __slots__ = ("first", "job", "last", "row", "status")

    def __init__(self, job: Job, first: int, last: int, row: int) -> None:
        self.job = job
        self.first = first
        self.last = last
        self.row = row
        self.status = 0

    @property
    def requests(self) -> int:
        """How many."""
        return self.last - self.first + 1

    def rows_to(self, wr_id: int) -> slice:
        """Rows of the requests first..wr_id."""
        return slice(self.row, self.row + wr_id - self.first + 1)


class SendQueue(Owner):
    """Posts for several jobs at once; completes them in the order of their posting."""

    def __init__(self, queue_pair: QueuePair, completions: Completions, endpoint: Endpoint) -> None:
        self.queue_pair = queue_pair
        self.completions = completions
        self._endpoint = endpoint
        self._posting = threading.Lock()  # guards the queue pair: one chain is posted at a time
        self._closed = False
        # Below: guarded by the lock of `completions`.
        self._chains: deque[_Chain] = deque()
        self._next = 1
        self._ended = 0  # id of the last request known to have ended
        self._good = 0  # and well
        self._broken = 0  # status of the first error
        self._moved_at = 0.0  # monotonic second of the last end, or of a post after all had ended
        self._probe = 0  # id of the WRITE_WITH_IMM that proves the path
        completions.add(queue_pair.number, self)

    @property
    def free(self) -> int:
        """Requests that fit now. A hint without the lock."""
        return self.queue_pair.caps.max_send_wr - (self._next - 1 - self._ended)

    def of_others(self, job: Job) -> int:
        """Requests of chains under way that are not this job's."""
        with self.completions.lock:
            return sum(chain.requests for chain in self._chains if chain.job is not job)

    @property
    def idle(self) -> bool:
        """Nothing is under way."""
        with self.completions.lock:
            return self._ended == self._next - 1

    def silence(self, now: float) -> float:
        """Seconds for which nothing has ended of what is under way."""
        with self.completions.lock:
            return now - self._moved_at if self._ended < self._next - 1 else 0.0

    @property
    def broken(self) -> int:
        """Status of the first request that failed; 0: none did."""
        return self._broken

    def post(
        self,
        job: Job,
        opcode: Opcode,
        work: Work,
        rows: slice,
        lkeys: NDArray[np.uint32],
        rkeys: NDArray[np.uint32],
        inline: int,
    ) -> int:
        """Post as many of `rows` as there is room for; 0: `job` is woken when there may be some.

        Raises:
            VerbsError: The queue pair takes nothing; nothing of it is under way for this call.
        """
        with self._posting:
            chain = None if self._closed else self._begin(job, rows)
            if chain is None:
                return 0
            taken = chain.rows_to(chain.last)
            wanted = chain.requests
            try:
                accepted = self.queue_pair.post(
                    opcode,
                    work,
                    taken,
                    lkeys,
                    rkeys,
                    wr_id=chain.first,
                    signal_every=SIGNAL_EVERY,
                    inline=inline,
                )
            except VerbsError:
                self._take_back(chain, 0)
                raise
            if accepted < wanted:
                # Our count says there is room. What was accepted may complete without a word:
                # the error that this raises makes it complete as flushed.
                self._take_back(chain, accepted)
                raise VerbsError(
                    errno.ENOMEM, f"posting {wanted} requests, of which {accepted} were taken"
                )
            return wanted

    def _begin(self, job: Job, rows: slice) -> _Chain | None:
        """Take places for a chain and remember it, before the NIC can complete it."""
        with self.completions.lock:
            wanted = min(rows.stop - rows.start, self.free)
            if self._broken or wanted <= 0:
                self.completions.starve(job)
                return None
            count = self.completions.take(wanted, job)
            if not count:
                return None
            chain = _Chain(job, self._next, self._next + count - 1, rows.start)
            self._number(count)
            self._chains.append(chain)
            job.posted(chain.rows_to(chain.last))
            return chain

    def _number(self, count: int) -> None:
        """Give the next `count` ids away. Lock held."""
        if self._ended == self._next - 1:
            self._moved_at = time.monotonic()
        self._next += count

    def _take_back(self, chain: _Chain, accepted: int) -> None:
        """Only the first `accepted` requests of the newest chain were posted."""
        with self.completions.lock:
            refused = chain.requests - accepted
            rest = slice(chain.rows_to(chain.last).stop - refused, chain.rows_to(chain.last).stop)
            chain.last -= refused
            self._next -= refused
            if not accepted:
                self._chains.remove(chain)
            self.completions.give_back(refused)
        chain.job.returned(rest)

    def probe(self, imm: int) -> None:
        """Post a WRITE_WITH_IMM of no bytes, which the peer sees and answers. Raises `VerbsError`.

        It proves what no completion does: with packet numbers that do not fit, requests complete
        and move nothing.
        """
        with self._posting:
            if self._closed:
                return
            with self.completions.lock:
                self._probe = self._next
                self._number(1)
                # Once in a queue pair's life, before there is traffic: never starved for long.
                self.completions.reserve()
            self.queue_pair.post_imm(imm, b"", 0, 0, wr_id=self._probe)

    @override
    def completed(self, wr_id: int, status: int, imm: int | None) -> int:
        """See `Owner`: requests up to `wr_id` have ended, well unless `status` says otherwise."""
        freed, self._ended = wr_id - self._ended, wr_id
        self._moved_at = time.monotonic()
        if status:
            self._broken = self._broken or status
        elif not self._broken:
            self._good = wr_id
        if wr_id >= self._probe > self._good:
            self._endpoint.broke(status)
        while self._chains and self._chains[0].first <= wr_id:
            chain = self._chains[0]
            if chain.status in {0, FLUSHED}:
                chain.status = status or chain.status
            if chain.last > wr_id:
                break
            self._chains.popleft()
            rows = chain.rows_to(chain.last)
            if not chain.status:
                chain.job.returned(rows)
                continue
            # What is known to have ended well need not move again; the rest may have moved.
            well = max(rows.start, rows.start + self._good - chain.first + 1)
            chain.job.returned(rows, Failed(slice(well, rows.stop), self._endpoint, chain.status))
        return freed

    def abandon(self) -> None:
        """The queue pair was destroyed with requests under way: give them back as flushed."""
        with self.completions.lock:
            if self._next - 1 > self._ended:
                self.completions.give_back(self.completed(self._next - 1, FLUSHED, None))

    def connect(self, connect: Callable[[QueuePair], None]) -> None:
        """Let `connect` take the queue pair to RTS, unless it was closed. Raises `VerbsError`."""
        with self._posting:
            if self._closed:
                raise VerbsError(errno.ENOTCONN, "connecting a queue pair that was closed")
            connect(self.queue_pair)

    def stop(self) -> None:
        """Make what is under way complete as flushed. Raises `VerbsError`."""
        with self._posting:
            if not self._closed:
                self.queue_pair.to_error()

    def close(self) -> None:
        """Destroy the queue pair; afterwards the NIC touches nothing for it. Idempotent."""
        with self._posting:
            self._closed = True
            self.queue_pair.close()
        self.completions.remove(self.queue_pair.number, self)
        self.abandon()
