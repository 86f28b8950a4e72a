"""Chains on a queue pair that ends them when the test says so: whose they are, and who is told."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mooncake_engine import RdmaConfig
from mooncake_engine.transport.rdma.completions import Completions
from mooncake_engine.transport.rdma.context import Context
from mooncake_engine.transport.rdma.endpoint import Endpoint
from mooncake_engine.transport.rdma.job import Failed, Job
from mooncake_engine.transport.rdma.rails import Rail
from mooncake_engine.transport.rdma.send_queue import SIGNAL_EVERY, SendQueue
from mooncake_engine.transport.rdma.verbs.base import Opcode, QueueCaps, VerbsError, Work
from verbs_stub import FLUSHED, HeldQueuePair, Provider, StubDevice, StubVerbs

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


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
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


def test_a_chain_is_given_back_when_its_last_request_has_ended(endpoint: Endpoint) -> None:
    bench, sender = Bench(endpoint), Sender()
    (queue,) = bench.queues
    assert sender.post(queue, 2 * SIGNAL_EVERY + 3) == 2 * SIGNAL_EVERY + 3
    assert (sender.job.under_way, sender.job.bytes_under_way) == (35, 350)
    nic(queue).end(2 * SIGNAL_EVERY + 2)
    bench.poll()
    assert sender.job.under_way == 35
    assert queue.free == 64 - 3  # but those places can be used by others
    nic(queue).end(1)
    bench.poll()
    assert (sender.job.under_way, sender.job.bytes_under_way) == (0, 0)
    assert sender.failed_rows() == []
    assert queue.idle


def test_no_more_is_posted_than_the_queue_pair_takes_and_who_waits_is_woken(
    endpoint: Endpoint,
) -> None:
    bench, sender, other = Bench(endpoint, wr=20), Sender(), Sender()
    (queue,) = bench.queues
    assert sender.post(queue, 50) == 20
    assert other.post(queue, 1) == 0
    assert not other.job.woken
    nic(queue).end(SIGNAL_EVERY)
    bench.poll()
    assert other.job.woken
    assert other.post(queue, 50) == SIGNAL_EVERY


def test_queue_pairs_share_the_places_of_their_completion_queue(endpoint: Endpoint) -> None:
    bench, sender = Bench(endpoint, queues=2, wr=64, depth=32), Sender()
    one, two = bench.queues
    assert sender.post(one, 64) + sender.post(two, 64) == 32 - 3  # three are kept for probes
    assert sender.post(two, 1) == 0
    nic(one).end(64)
    bench.poll()
    assert sender.job.woken
    assert sender.post(two, 64) == 29


def test_what_is_known_to_have_ended_well_before_an_error_does_not_come_back(
    endpoint: Endpoint,
) -> None:
    bench, sender = Bench(endpoint), Sender()
    (queue,) = bench.queues
    sender.post(queue, 40)
    nic(queue).end(SIGNAL_EVERY + 5)
    nic(queue).fail(REFUSED)
    bench.poll()
    # Five more ended well, but nobody said so before the error.
    assert sender.failed_rows() == list(range(SIGNAL_EVERY, 40))
    assert [failed.status for failed in sender.failed] == [REFUSED]
    assert sender.failed[0].endpoint is endpoint
    assert (sender.job.under_way, queue.idle, queue.broken) == (0, True, REFUSED)


def test_only_the_one_to_blame_is_told_of_an_error_and_the_others_were_flushed(
    endpoint: Endpoint,
) -> None:
    bench, senders = Bench(endpoint), [Sender() for _ in range(3)]
    (queue,) = bench.queues
    for sender in senders:
        sender.post(queue, 5)
    nic(queue).end(7)
    nic(queue).fail(REFUSED)
    bench.poll()
    assert [sender.failed_rows() for sender in senders] == [[], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert [failed.status for sender in senders for failed in sender.failed] == [REFUSED, FLUSHED]


def test_nothing_is_posted_after_an_error(endpoint: Endpoint) -> None:
    bench, sender = Bench(endpoint), Sender()
    (queue,) = bench.queues
    sender.post(queue, 1)
    nic(queue).fail(REFUSED)
    bench.poll()
    assert sender.post(queue, 1) == 0
    assert len(bench.provider.of("post")) == 1


def test_a_chain_that_was_taken_in_part_is_an_error_and_comes_back_once_it_was_flushed(
    endpoint: Endpoint,
) -> None:
    bench, sender = Bench(endpoint), Sender()
    (queue,) = bench.queues
    nic(queue).accepts = 3
    with pytest.raises(VerbsError, match=r"posting 10 requests, of which 3"):
        sender.post(queue, 10)
    assert sender.job.under_way == 3
    queue.stop()
    bench.poll()
    assert sender.failed_rows() == [0, 1, 2]
    assert sender.job.under_way == 0


def test_a_chain_that_was_refused_is_not_under_way(endpoint: Endpoint) -> None:
    bench, sender = Bench(endpoint, wr=8), Sender()
    (queue,) = bench.queues
    bench.provider.fail("post", 22)
    with pytest.raises(VerbsError):
        sender.post(queue, 8)
    assert (sender.job.under_way, sender.failed_rows()) == (0, [])
    assert sender.post(queue, 8) == 8  # its places are free again


def test_what_is_under_way_when_a_queue_pair_is_destroyed_comes_back_flushed(
    endpoint: Endpoint,
) -> None:
    bench, sender = Bench(endpoint, depth=32), Sender()
    (queue,) = bench.queues
    assert sender.post(queue, 29) == 29
    nic(queue).end(SIGNAL_EVERY)
    queue.close()
    queue.close()
    assert sender.failed_rows() == list(range(SIGNAL_EVERY, 29))
    assert sender.post(queue, 1) == 0
    assert sender.post(bench.another(), 29) == 29  # the places are free again
    assert not bench.completions.poll()


def test_a_new_queue_pair_may_have_the_number_of_one_that_is_being_closed(
    endpoint: Endpoint,
) -> None:
    """The number is free again as soon as the NIC has destroyed the old one."""
    bench, sender = Bench(endpoint), Sender()
    (old,) = bench.queues
    new = bench.another()
    new.queue_pair.number = old.queue_pair.number
    bench.completions.add(old.queue_pair.number, new)
    old.close()
    sender.post(new, 1)
    nic(new).end(1)
    bench.poll()
    assert sender.job.under_way == 0


class Step(NamedTuple):
    """`what` with queue pair and job number `which`, `count` requests."""

    what: str
    which: tuple[int, int]
    count: int


STEPS = st.lists(
    st.builds(
        Step,
        st.sampled_from(["post"] * 6 + ["end"] * 4 + ["poll"] * 3 + ["fail", "stop", "close"]),
        st.tuples(st.integers(0, 2), st.integers(0, 2)),
        st.integers(1, 40),
    ),
    max_size=60,
)


class Model:
    """What the NIC did, beside what jobs were told."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.bench = Bench(endpoint, queues=3, wr=24, depth=48)
        self.senders = [Sender() for _ in range(3)]
        self._posted: dict[tuple[int, int], tuple[int, int]] = {}  # pair, wr_id -> sender, row
        self._pairs = [nic(queue) for queue in self.bench.queues]
        self._starved: set[int] = set()

    def take(self, step: Step) -> None:
        queue = self.bench.queues[step.which[0]]
        room = self._room()
        match step.what:
            case "post":
                self._post(queue, step.which[1], step.count)
            case "end":
                nic(queue).end(step.count)
            case "fail":
                nic(queue).fail(REFUSED)
            case "stop":
                self._stop(queue)
            case "poll":
                self.bench.completions.poll()
            case "close":
                queue.close()
                self.bench.queues[step.which[0]] = new = self.bench.another()
                self._pairs.append(nic(new))
        if step.what in {"poll", "stop"} and self._room() > room:
            self._all_woken()
        for sender in self.senders:
            sender.failed_rows()
        self.check()

    def _room(self) -> int:
        return sum(queue.free for queue in self.bench.queues)

    def _post(self, queue: SendQueue, who: int, count: int) -> None:
        sender = self.senders[who]
        first = sender.next
        posted = sender.post(queue, count)
        assert 0 <= posted <= count
        if not posted:
            self._starved.add(who)
            return
        wr_id = self.bench.provider.of("post")[-1]["wr_id"]
        for number in range(posted):
            self._posted[queue.queue_pair.number, wr_id + number] = (who, first + number)

    def _stop(self, queue: SendQueue) -> None:
        """As an endpoint does that failed."""
        queue.stop()
        self.bench.completions.wake_starved()
        self._all_woken()

    def _all_woken(self) -> None:
        for who in self._starved:
            assert self.senders[who].job.woken
            self.senders[who].job.wait(0.0)
        self._starved.clear()

    def check(self) -> None:
        """Nothing is given back while the NIC may touch its memory."""
        touching = [0, 0, 0]
        for pair in self._pairs:
            for wr_id in pair.under_way:
                touching[self._posted[pair.number, wr_id][0]] += 1
        for sender, count in zip(self.senders, touching, strict=True):
            assert count <= sender.job.under_way <= sender.next

    def finish(self) -> None:
        """End all; afterwards everybody knows everything, and every place is free."""
        for queue in self.bench.queues:
            nic(queue).end(1000)
        self.bench.poll()
        self.check()
        well = {
            self._posted[pair.number, wr_id] for pair in self._pairs for wr_id in pair.ended_well
        }
        for who, sender in enumerate(self.senders):
            assert (sender.job.under_way, sender.job.bytes_under_way) == (0, 0)
            failed = {(who, row) for row in sender.failed_rows()}
            moved = {(who, row) for row in range(sender.next)} - failed
            assert moved <= well
        for queue in self.bench.queues:
            queue.close()
        last = Sender()
        fresh = [self.bench.another() for _ in range(2)]
        assert last.post(fresh[0], 24) + last.post(fresh[1], 24) == 48 - 4
        nic(fresh[0]).end(24)
        nic(fresh[1]).end(24)
        self.bench.poll()
        assert last.job.under_way == 0


@settings(max_examples=300)
@given(STEPS)
def test_every_request_comes_back_once_and_not_before_its_nic_has_let_go(
    endpoint: Endpoint, steps: list[Step]
) -> None:
    model = Model(endpoint)
    for step in steps:
        model.take(step)
    model.finish()
