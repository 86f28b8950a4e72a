"""Chains on a queue pair that ends them when the test says so: whose they are, and who is told."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from mooncake_engine.transport.rdma.send_queue import SIGNAL_EVERY
from mooncake_engine.transport.rdma.verbs.base import VerbsError
from send_bench import REFUSED, Bench, Sender, an_endpoint, nic
from verbs_held import FLUSHED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mooncake_engine.transport.rdma.endpoint import Endpoint


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    with an_endpoint() as made:
        yield made


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
