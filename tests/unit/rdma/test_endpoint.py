"""An endpoint's life, and who is told of it: made, proven, failed, closed, in any order."""

from __future__ import annotations

import contextlib
import errno
import itertools
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
from mooncake_engine import RdmaConfig
from mooncake_engine.transport.rdma.context import Context
from mooncake_engine.transport.rdma.endpoint import FOLLOWS, Endpoint, Failure, State
from mooncake_engine.transport.rdma.job import Job
from mooncake_engine.transport.rdma.messages import Accepted, QueueAddress
from mooncake_engine.transport.rdma.rails import Rail
from mooncake_engine.transport.rdma.verbs.base import Opcode, Work
from verbs_held import FLUSHED, HeldQueuePair
from verbs_stub import Provider, StubDevice, StubVerbs

if TYPE_CHECKING:
    from collections.abc import Iterator

QUEUES = 3
LIMIT_S = 30.0
RETRIES_EXCEEDED = 12
BROKEN = Failure("the test says so", rail=True)
ROWS = 100
WORK = Work(
    np.zeros(ROWS, np.uint64),
    np.arange(ROWS),
    np.ones(ROWS, np.int64),
    np.zeros(ROWS, np.uint64),
    np.zeros(ROWS, np.uint32),
)
KEYS = np.zeros(ROWS, np.uint32)


class Stage:
    """One NIC, and an endpoint on it."""

    def __init__(self, context: Context, provider: Provider) -> None:
        self.context = context
        self.provider = provider
        self.told: list[State] = []
        self.endpoint = Endpoint(
            context,
            Rail(0, 0),
            context.record,
            deadline=time.monotonic() + LIMIT_S,
            on_state=lambda _endpoint, state: self.told.append(state),
        )
        self.job = Job()
        self.job.begin(np.ones(ROWS, np.uint64))

    def accept(self, queues: int = QUEUES) -> None:
        addresses = tuple(QueueAddress(100 + number, number) for number in range(queues))
        self.endpoint.accepted(Accepted(self.endpoint.token, addresses, 4096, 16))

    def ready(self) -> None:
        self.accept()
        for number, nic in enumerate(self.nics):
            nic.end(1)
            self.endpoint.proven(number)
        self.until(lambda: self.endpoint.idle)
        assert self.endpoint.state is State.READY

    @property
    def nics(self) -> list[HeldQueuePair]:
        pairs = [queue.queue_pair for queue in self.endpoint.queues]
        return [pair for pair in pairs if isinstance(pair, HeldQueuePair)]

    def post(self, *rows: int) -> int:
        return self.endpoint.post(self.job, Opcode.READ, WORK, slice(*rows), KEYS, KEYS, 0)

    def until(self, condition: object) -> None:
        assert callable(condition)
        end = time.monotonic() + LIMIT_S
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.001)

    def woken(self) -> bool:
        """Whether the job is woken, soon; its next wait waits again."""
        self.job.wait(time.monotonic() + LIMIT_S)
        return True


@pytest.fixture
def stage() -> Iterator[Stage]:
    provider = Provider()
    device = StubDevice(provider, queue_pairs=HeldQueuePair)
    config = RdmaConfig(num_qp=QUEUES, max_wr=16, num_workers=1)
    context = Context(StubVerbs(device), device.name, config, numa=-1, cpus=None)
    with contextlib.closing(context):
        made = Stage(context, provider)
        with contextlib.closing(made.endpoint):
            yield made
    assert provider.open == 0


def test_it_is_ready_when_each_of_its_queue_pairs_is_proven(stage: Stage) -> None:
    endpoint = stage.endpoint
    assert endpoint.wait_for(stage.job) is State.CONNECTING
    assert endpoint.pinned
    stage.accept()
    assert endpoint.state is State.PROVING
    assert endpoint.pinned
    assert [call["imm"] for call in stage.provider.of("post_imm")] == list(range(QUEUES))
    for number in (2, 0, 2, 0):  # twice is no harm
        endpoint.proven(number)
    assert endpoint.state is State.PROVING
    assert not stage.job.woken
    endpoint.proven(1)
    assert (endpoint.state, stage.told, stage.job.woken) == (State.READY, [State.READY], True)
    for nic in stage.nics:
        nic.end(1)
    stage.until(lambda: not endpoint.pinned)  # its probes were waited for


def test_a_write_that_completes_proves_nothing(stage: Stage) -> None:
    """Only the peer's word does: packets that look repeated complete and move nothing."""
    stage.accept()
    for nic in stage.nics:
        nic.end(1)
    stage.until(lambda: stage.endpoint.idle)
    assert stage.endpoint.state is State.PROVING


def test_it_fails_when_a_probe_does_and_nobody_else_is_there(stage: Stage) -> None:
    stage.accept()
    stage.endpoint.wait_for(stage.job)
    stage.nics[1].fail(RETRIES_EXCEEDED)
    assert stage.woken()
    assert stage.endpoint.state is State.FAILED
    assert stage.endpoint.failure is not None
    assert "first write did not arrive" in stage.endpoint.failure.reason
    assert stage.endpoint.failure.rail


@pytest.mark.parametrize("queues", [0, QUEUES - 1, QUEUES + 1])
def test_an_answer_for_other_queue_pairs_than_asked_for_is_a_failure(
    stage: Stage, queues: int
) -> None:
    stage.accept(queues)
    assert stage.told == [State.FAILED]
    assert stage.endpoint.failure is not None
    assert f"{queues} queue pairs for {QUEUES}" in stage.endpoint.failure.reason


@pytest.mark.parametrize("verb", ["to_rtr", "to_rts", "post_imm"])
def test_a_queue_pair_that_cannot_be_connected_is_a_failure_of_the_rail(
    stage: Stage, verb: str
) -> None:
    stage.provider.fail(verb, errno.ETIMEDOUT, after=1)
    stage.endpoint.wait_for(stage.job)
    stage.accept()
    assert stage.told == [State.FAILED]
    assert stage.job.woken
    assert stage.endpoint.failure is not None
    assert verb in stage.endpoint.failure.reason
    stage.endpoint.close()
    assert stage.endpoint.idle


def test_what_is_under_way_comes_back_flushed_when_it_fails(stage: Stage) -> None:
    stage.ready()
    assert stage.post(0, 5) == 5
    assert stage.post(5, 8) == 3
    assert sorted(len(nic.under_way) for nic in stage.nics) == [0, 3, 5]  # in turn
    assert stage.endpoint.fail(BROKEN)
    assert not stage.endpoint.fail(Failure("again", rail=False))
    stage.until(lambda: stage.endpoint.idle)
    failed = stage.job.take_failed()
    assert sorted(one.rows.start for one in failed) == [0, 5]
    assert {one.status for one in failed} == {FLUSHED}
    assert stage.job.quiet
    assert stage.endpoint.failure == BROKEN
    assert stage.told == [State.READY, State.FAILED]


def test_jobs_at_work_side_by_side_come_to_have_queue_pairs_of_their_own(stage: Stage) -> None:
    stage.ready()
    first, second, third = jobs = [stage.job, Job(), Job()]
    for job in (second, third):
        job.begin(np.ones(ROWS, np.uint64))

    def post(job: Job) -> None:
        assert stage.endpoint.post(job, Opcode.READ, WORK, slice(0, 1), KEYS, KEYS, 0) == 1

    def of_others(job: Job) -> list[int]:
        return sorted(queue.of_others(job) for queue in stage.endpoint.queues)

    for _ in range(QUEUES):
        post(first)
    assert of_others(second) == [1, 1, 1]  # alone it was spread over all
    for nic in stage.nics:
        nic.end(1)
    for completions in stage.context.completions:
        completions.poll()
    for _ in range(4):
        for job in jobs:
            post(job)
    assert [of_others(job) for job in jobs] == [[0, 4, 4]] * 3


def test_who_finds_it_full_is_woken_by_room_and_by_its_end(stage: Stage) -> None:
    stage.ready()
    other = Job()
    other.begin(np.ones(ROWS, np.uint64))
    taken = 0
    while count := stage.post(taken, taken + 16):
        taken += count
    assert taken == 16 * QUEUES
    assert stage.endpoint.post(other, Opcode.READ, WORK, slice(0, 1), KEYS, KEYS, 0) == 0
    assert not other.woken
    stage.nics[0].end(16)
    for completions in stage.context.completions:
        completions.poll()
    assert other.woken
    other.wait(0.0)
    assert stage.endpoint.post(other, Opcode.READ, WORK, slice(0, 16), KEYS, KEYS, 0) == 16
    assert stage.endpoint.post(other, Opcode.READ, WORK, slice(16, 17), KEYS, KEYS, 0) == 0
    stage.endpoint.fail(BROKEN)
    assert other.woken
    stage.until(lambda: stage.endpoint.idle)


def test_who_posts_when_it_has_failed_already_is_woken_too(stage: Stage) -> None:
    stage.ready()
    assert [stage.post(row, row + 1) for row in range(QUEUES)] == [1] * QUEUES
    stage.endpoint.fail(BROKEN)
    stage.until(lambda: stage.endpoint.idle)
    stage.job.wait(0.0)
    assert stage.post(QUEUES, QUEUES + 1) == 0
    assert stage.job.woken
    assert stage.endpoint.wait_for(stage.job) is State.FAILED


def test_who_finds_it_broken_is_woken_when_somebody_has_failed_it(stage: Stage) -> None:
    """An error is seen by whose request it was; the others wait until that one says so."""
    stage.ready()
    for row in range(QUEUES):
        stage.post(row, row + 1)
    for nic in stage.nics:
        nic.fail(RETRIES_EXCEEDED)
    for completions in stage.context.completions:
        completions.poll()
    other = Job()
    other.begin(np.ones(ROWS, np.uint64))
    assert stage.endpoint.post(other, Opcode.READ, WORK, slice(0, 1), KEYS, KEYS, 0) == 0
    assert stage.endpoint.state is State.READY
    assert not other.woken
    stage.endpoint.fail(BROKEN)
    assert other.woken


def test_a_chain_that_the_nic_refuses_fails_it_and_stays_with_its_job(stage: Stage) -> None:
    stage.ready()
    stage.provider.fail("post", errno.EINVAL)
    assert stage.post(0, 5) == 0
    assert stage.told == [State.READY, State.FAILED]
    assert stage.job.woken
    assert stage.job.quiet  # nothing is under way, so nothing comes back


def test_closing_it_gives_back_what_never_completed(stage: Stage) -> None:
    stage.ready()
    stage.post(0, 5)
    stage.endpoint.close()
    stage.endpoint.close()
    assert stage.endpoint.state is State.CLOSED
    assert [(one.rows, one.status) for one in stage.job.take_failed()] == [(slice(0, 5), FLUSHED)]
    assert stage.job.quiet
    stage.accept()  # an answer that comes late
    stage.endpoint.proven(0)
    assert stage.told == [State.READY, State.FAILED]


def test_only_listed_steps_are_taken(stage: Stage) -> None:
    """Whatever happens in whatever order."""
    steps = {
        "accept": stage.accept,
        "prove": lambda: [stage.endpoint.proven(number) for number in range(QUEUES)],
        "fail": lambda: stage.endpoint.fail(BROKEN),
        "close": stage.endpoint.close,
    }
    for order in itertools.permutations(steps):
        made = Stage(stage.context, stage.provider)
        steps["accept"] = made.accept
        steps["prove"] = lambda made=made: [made.endpoint.proven(n) for n in range(QUEUES)]  # type: ignore[misc]  # binds now
        steps["fail"] = lambda made=made: made.endpoint.fail(BROKEN)  # type: ignore[misc]  # binds now
        steps["close"] = made.endpoint.close
        before = made.endpoint.state
        for name in order:
            steps[name]()
            after = made.endpoint.state
            reached = {before} | FOLLOWS[before]
            reached |= {state for step in tuple(reached) for state in FOLLOWS[step]}
            assert after in reached, (order, name)
            before = after
        assert before is State.CLOSED
        assert made.told in ([State.FAILED], [State.READY, State.FAILED])
        stage.until(lambda made=made: made.endpoint.idle)
