"""A completion queue that several share: its places, who is woken, and when it is armed."""

from __future__ import annotations

import contextlib
import select
from typing import TYPE_CHECKING

import pytest
from mooncake_engine.transport.rdma.completions import Completions, Owner
from mooncake_engine.transport.rdma.job import Job
from mooncake_engine.transport.rdma.verbs.base import VerbsError
from typing_extensions import override
from verbs_stub import LIMITS, Provider, StubChannel, StubCompletionQueue, StubDevice

if TYPE_CHECKING:
    from collections.abc import Iterator

DEPTH = 64
KEPT = 1 + DEPTH // 16  # for probes
NUMBER = 7


class Noting(Owner):
    """Notes what it is told; each completion ends one request."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int, int | None]] = []

    @override
    def completed(self, wr_id: int, status: int, imm: int | None) -> int:
        self.told.append((wr_id, status, imm))
        return 1


@pytest.fixture
def channel() -> Iterator[StubChannel]:
    with contextlib.closing(StubDevice(Provider()).channel()) as made:
        yield made


def queue_of(
    channel: StubChannel, *, depth: int = DEPTH, limit: int = DEPTH, keep_armed: bool = False
) -> Completions:
    device = StubDevice(channel.provider, limits=LIMITS)
    return Completions(device, depth, channel, limit, keep_armed=keep_armed)


def complete(completions: Completions, *wr_ids: int, number: int = NUMBER) -> None:
    assert isinstance(completions.queue, StubCompletionQueue)
    for wr_id in wr_ids:
        completions.queue.complete(wr_id, number)


def take(completions: Completions, wanted: int, job: Job | None = None) -> int:
    with completions.lock:
        return completions.take(wanted, job or Job())


def rung(channel: StubChannel) -> bool:
    return bool(select.select([channel.fileno()], [], [], 0)[0])


@pytest.mark.parametrize("limit", [10, DEPTH, 10 * DEPTH])
def test_no_more_places_are_given_than_there_are(channel: StubChannel, limit: int) -> None:
    completions = queue_of(channel, limit=limit)
    most = min(limit, DEPTH - KEPT)
    assert take(completions, most - 1) == most - 1
    assert take(completions, 5) == 1
    assert take(completions, 5) == 0
    with completions.lock:
        completions.give_back(3)
    assert take(completions, 5) == 3


def test_probes_have_places_when_nobody_else_has_and_no_more_than_fit(
    channel: StubChannel,
) -> None:
    completions = queue_of(channel)
    take(completions, DEPTH)
    with completions.lock:
        for _ in range(KEPT):
            completions.reserve()
        with pytest.raises(VerbsError, match="place in a completion queue"):
            completions.reserve()
        completions.give_back(KEPT)  # the probes'
    assert take(completions, 1) == 0  # they are kept for the next ones
    with completions.lock:
        completions.give_back(1)
    assert take(completions, 1) == 1


def test_who_found_no_place_is_woken_by_each_that_comes_back_and_once(
    channel: StubChannel,
) -> None:
    completions, job, full = queue_of(channel), Job(), Job()
    completions.add(NUMBER, Noting())
    take(completions, DEPTH)
    assert take(completions, 1, job) == 0
    with completions.lock:
        completions.starve(full)  # its queue pair has no room
    completions.poll()
    assert not job.woken
    complete(completions, 1)
    assert completions.poll() == 1
    assert job.woken
    assert full.woken
    job.wait(0.0)
    complete(completions, 2)
    completions.poll()
    assert not job.woken


def test_who_waits_for_room_is_woken_when_its_queue_pair_failed(channel: StubChannel) -> None:
    completions, job = queue_of(channel), Job()
    with completions.lock:
        completions.starve(job)
    completions.wake_starved()
    assert job.woken


def test_completions_go_to_the_owner_of_their_queue_pair(channel: StubChannel) -> None:
    completions, one, two = queue_of(channel), Noting(), Noting()
    completions.add(1, one)
    completions.add(2, two)
    complete(completions, 11, number=1)
    complete(completions, 21, 22, number=2)
    complete(completions, 31, number=3)  # nobody's any more
    assert completions.poll() == 4
    assert one.told == [(11, 0, None)]
    assert two.told == [(21, 0, None), (22, 0, None)]


def test_what_a_destroyed_queue_pair_completed_before_leaves_the_queue_with_it(
    channel: StubChannel,
) -> None:
    completions, gone, heir = queue_of(channel), Noting(), Noting()
    completions.add(NUMBER, gone)
    complete(completions, 1, 2)
    completions.remove(NUMBER, gone)
    assert [wr_id for wr_id, _, _ in gone.told] == [1, 2]
    assert completions.poll() == 0
    completions.add(NUMBER, heir)
    completions.remove(NUMBER, gone)  # late
    complete(completions, 3)
    completions.poll()
    assert heir.told == [(3, 0, None)]


def test_more_than_one_poll_takes_is_all_served(channel: StubChannel) -> None:
    completions, owner = queue_of(channel, depth=1000, limit=1000), Noting()
    completions.add(NUMBER, owner)
    complete(completions, *range(600))
    completions.serve()
    assert [wr_id for wr_id, _, _ in owner.told] == list(range(600))


def test_what_came_before_it_was_armed_is_not_missed(channel: StubChannel) -> None:
    completions, owner = queue_of(channel), Noting()
    completions.add(NUMBER, owner)
    complete(completions, 1)
    assert not rung(channel)
    completions.arm()
    assert len(owner.told) == 1
    complete(completions, 2)
    assert rung(channel)


@pytest.mark.parametrize(
    ("under_way", "keep_armed", "armed"),
    [(0, False, False), (1, False, True), (0, True, True)],
)
def test_a_channel_goes_on_being_told_while_something_is_awaited(
    channel: StubChannel, *, under_way: int, keep_armed: bool, armed: bool
) -> None:
    completions = queue_of(channel, keep_armed=keep_armed)
    take(completions, under_way)
    completions.serve()
    complete(completions, 1)
    assert rung(channel) is armed
