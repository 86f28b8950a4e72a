"""Sending queues against a model: posts, ends, errors and closes in any order."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from send_bench import REFUSED, Bench, Sender, an_endpoint, nic

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mooncake_engine.transport.rdma.endpoint import Endpoint
    from mooncake_engine.transport.rdma.send_queue import SendQueue


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    with an_endpoint() as made:
        yield made


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
