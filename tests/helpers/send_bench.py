"""Sending queues on stub queue pairs, and jobs that post to them."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import numpy as np
from mooncake_engine import RdmaConfig
from mooncake_engine.transport.rdma.completions import Completions
from mooncake_engine.transport.rdma.context import Context
from mooncake_engine.transport.rdma.endpoint import Endpoint
from mooncake_engine.transport.rdma.job import Failed, Job
from mooncake_engine.transport.rdma.rails import Rail
from mooncake_engine.transport.rdma.send_queue import SendQueue
from mooncake_engine.transport.rdma.verbs.base import Opcode, QueueCaps, Work
from verbs_held import HeldQueuePair
from verbs_stub import Provider, StubDevice, StubVerbs

if TYPE_CHECKING:
    from collections.abc import Iterator

REFUSED = 10  # IBV_WC_REM_ACCESS_ERR
ROWS = 10_000  # more than any test posts for one job
EMPTY = Work(
    np.zeros(ROWS, np.uint64),
    np.arange(ROWS),
    np.ones(ROWS, np.int64),
    np.zeros(ROWS, np.uint64),
    np.zeros(ROWS, np.uint32),
)
KEYS = np.zeros(ROWS, np.uint32)


@contextlib.contextmanager
def an_endpoint() -> Iterator[Endpoint]:
    """Whom the queues below belong to, as far as their jobs are told."""
    device = StubDevice(Provider(), queue_pairs=HeldQueuePair)
    context = Context(StubVerbs(device), device.name, RdmaConfig(), numa=-1, cpus=None)
    with contextlib.closing(context):
        made = Endpoint(
            context,
            Rail(0, 0),
            context.record,
            deadline=time.monotonic() + 60,
            on_state=lambda _endpoint, _state: None,
        )
        with contextlib.closing(made):
            yield made


class Sender:
    """A job that posts its rows in order, as far as there is room."""

    def __init__(self) -> None:
        self.job = Job()
        self.job.begin(np.full(ROWS, 10, np.uint64))
        self.next = 0
        self.failed: list[Failed] = []

    def post(self, queue: SendQueue, count: int) -> int:
        rows = slice(self.next, self.next + count)
        posted = queue.post(self.job, Opcode.READ, EMPTY, rows, KEYS, KEYS, 0)
        self.next += posted
        return posted

    def failed_rows(self) -> list[int]:
        """All that came back failed so far; none twice."""
        self.failed += self.job.take_failed()
        rows = [row for failed in self.failed for row in range(ROWS)[failed.rows]]
        assert len(rows) == len(set(rows))
        return rows


class Bench:
    """One completion queue and queue pairs that share it."""

    def __init__(
        self, endpoint: Endpoint, *, queues: int = 1, wr: int = 64, depth: int = 256
    ) -> None:
        self.provider = Provider()
        self.device = StubDevice(self.provider, queue_pairs=HeldQueuePair)
        channel = endpoint.queues[0].completions.channel  # never rung here: nothing arms
        self.completions = Completions(self.device, depth, channel, depth)
        self._endpoint = endpoint
        self._caps = QueueCaps(wr, 1, 1, 0, 0)
        self.queues = [self.another() for _ in range(queues)]

    def another(self) -> SendQueue:
        cq = self.completions.queue
        pair = self.device.queue_pair(cq, cq, self._caps)
        return SendQueue(pair, self.completions, self._endpoint)

    def poll(self) -> None:
        while self.completions.poll():
            pass


def nic(queue: SendQueue) -> HeldQueuePair:
    assert isinstance(queue.queue_pair, HeldQueuePair)
    return queue.queue_pair
