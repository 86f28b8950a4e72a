"""The worker's promises, over loopback lanes that wait and fail on command."""

from __future__ import annotations

import queue
import random
import threading
import time
from typing import TYPE_CHECKING

import pytest
from engines import SOON, two_engines
from mooncake_engine import PathUnavailable, Status
from mooncake_engine.errors import LaneError
from mooncake_engine.testing.faults import Faults
from mooncake_engine.worker import LinkWorker
from recording_link import PIECE, RecordingLink, batch_of, close

if TYPE_CHECKING:
    from mooncake_engine import Batch, Completion
    from mooncake_engine.types import Slice


def test_a_small_batch_does_not_wait_behind_a_big_one() -> None:
    begin = threading.Event()
    link = RecordingLink(lanes=1, move=lambda _piece: begin.wait(SOON) and None)
    worker = LinkWorker(link, "test")
    ends: list[int] = []
    big = batch_of(worker, 1000, lambda _end: ends.append(len(link.moved)))
    small = batch_of(worker, 1, lambda _end: ends.append(len(link.moved)))
    worker.submit(big)
    worker.submit(small)
    begin.set()
    assert big.wait(SOON).ok
    assert small.wait(SOON).ok
    assert ends[0] <= 3, f"the small batch ended after {ends[0]} slices"
    assert ends[1] == 1001
    close(worker)
    assert link.closed
    assert not link.open_lanes


def test_slices_of_one_batch_share_the_lanes() -> None:
    together = threading.Barrier(3)
    link = RecordingLink(lanes=3, move=lambda _piece: together.wait(SOON) and None)
    worker = LinkWorker(link, "test")
    batch = batch_of(worker, 6)
    worker.submit(batch)
    assert batch.wait(SOON).ok  # the barrier lets nobody through unless three move at once
    assert len(link.open_lanes) == 3
    close(worker)


def test_two_small_batches_submitted_at_once_use_two_lanes() -> None:
    together = threading.Barrier(2)
    link = RecordingLink(lanes=2, move=lambda _piece: together.wait(SOON) and None)
    worker = LinkWorker(link, "test")
    for _ in range(20):
        batches = [batch_of(worker, 1) for _ in range(2)]
        for batch in batches:
            worker.submit(batch)
        assert all(batch.wait(SOON).ok for batch in batches)
    close(worker)


def test_no_more_lanes_open_than_there_are_slices() -> None:
    link = RecordingLink(lanes=8)
    worker = LinkWorker(link, "test")
    for _ in range(20):
        batch = batch_of(worker, 1)
        worker.submit(batch)
        assert batch.wait(SOON).ok
    assert len(link.open_lanes) <= 2  # the second: submitted before the first lane was idle again
    close(worker)


def test_idle_lanes_are_closed_and_come_back() -> None:
    link = RecordingLink(lanes=2)
    worker = LinkWorker(link, "idle test", idle_s=0.05)
    for _ in range(3):
        batch = batch_of(worker, 4)
        worker.submit(batch)
        assert batch.wait(SOON).ok
        for thread in threading.enumerate():
            if thread.name == "mooncake idle test":
                thread.join(SOON)
        assert not link.open_lanes
    close(worker)


def test_the_first_failure_ends_a_batch_and_drops_the_rest() -> None:
    with two_engines() as two:
        two.faults.slice_bytes = PIECE
        two.faults.fail(Status.REFUSED, "no, says the target")
        end = two.read().wait(SOON)
        assert (end.status, end.error) == (Status.REFUSED, "no, says the target")
        assert two.faults.moves < 256
        assert two.read().wait(SOON).ok


def test_a_broken_lane_is_replaced_and_a_refusal_leaves_it_in_use() -> None:
    with two_engines() as two:
        assert two.read(0, 10).wait(SOON).ok
        assert two.faults.opened == 1
        two.faults.fail(Status.REFUSED, "no")
        assert two.read(0, 10).wait(SOON).status is Status.REFUSED
        assert two.read(0, 10).wait(SOON).ok
        assert two.faults.opened == 1
        two.faults.fail(Status.PEER_GONE, "hung up")
        assert two.read(0, 10).wait(SOON).status is Status.PEER_GONE
        assert two.read(0, 10).wait(SOON).ok
        assert two.faults.opened == 2


def test_a_peer_that_cannot_be_reached_again_ends_what_is_queued() -> None:
    with two_engines() as two:
        two.faults.fail_open(Status.PEER_GONE, "nobody there", times=2)
        end = two.read(0, 10).wait(SOON)
        assert (end.status, end.error) == (Status.PEER_GONE, "nobody there")


def test_one_lane_is_enough_when_the_peer_refuses_a_second() -> None:
    with two_engines() as two:
        two.faults.slice_bytes = PIECE
        two.faults.hold()
        first = two.read(0, PIECE)
        two.faults.wait_held()
        two.faults.fail_open(Status.FAILED, "lanes are full", times=1)
        second = two.read(PIECE, PIECE * 10)
        two.faults.release()
        assert first.wait(SOON).ok
        assert second.wait(SOON).ok


def test_a_bug_in_a_transport_fails_its_batch_and_not_the_worker(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def explode(piece: Slice) -> None:
        if piece.nbytes == PIECE * 2:
            raise ZeroDivisionError("a bug")

    link = RecordingLink(move=explode)
    worker = LinkWorker(link, "test")
    bad, good = batch_of(worker, 2), batch_of(worker, 1)
    worker.submit(bad)
    worker.submit(good)
    assert "ZeroDivisionError('a bug')" in bad.wait(SOON).error
    assert bad.wait(SOON).status is Status.FAILED
    assert good.wait(SOON).ok
    assert "failed unexpectedly" in caplog.text
    close(worker)


def test_a_bug_in_a_callback_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    with two_engines() as two:
        heard: queue.SimpleQueue[Completion] = queue.SimpleQueue()
        two.faults.hold()
        batch = two.read()
        batch.add_done_callback(lambda _end: 1 / 0)
        batch.add_done_callback(heard.put)
        two.faults.release()
        assert batch.wait(SOON).ok
        assert two.read().wait(SOON).ok
        assert heard.get(timeout=SOON).ok  # callbacks run beside whoever waits for the batch
        assert "ZeroDivisionError" in caplog.text
    assert heard.empty()


def test_a_callback_may_submit_and_close() -> None:
    with two_engines() as two:
        submitted: list[Batch] = []
        closed = threading.Event()
        segment = two.open()
        two.faults.hold()

        def again(_end: Completion) -> None:
            submitted.append(two.near.submit("read", segment, [two.row()]))
            two.near.close()
            closed.set()

        batch = two.read()
        batch.add_done_callback(again)
        two.faults.release()
        assert closed.wait(SOON)
        assert batch.wait(SOON).ok
        assert submitted[0].wait(SOON).status in {Status.OK, Status.CANCELLED}


def test_cancel_completes_only_after_the_lanes_came_back() -> None:
    with two_engines() as two:
        two.faults.slice_bytes = PIECE
        two.faults.hold(stubborn=True)  # lanes that do not heed the interrupt
        batch = two.read()
        two.faults.wait_held(2)
        batch.cancel()
        batch.cancel()
        with pytest.raises(TimeoutError, match="it goes on"):
            batch.wait(0.05)
        assert batch.poll() is None
        two.faults.release()
        end = batch.wait(SOON)
        assert (end.status, end.error) == (Status.CANCELLED, "cancelled by the caller")
        batch.cancel()
        assert batch.wait(SOON) is end


def test_cancel_leaves_other_batches_alone() -> None:
    with two_engines() as two:
        two.faults.slice_bytes = PIECE
        two.faults.hold()
        batches = [two.read(n * PIECE, PIECE) for n in range(4)]
        two.faults.wait_held(2)
        for batch in batches[::2]:
            batch.cancel()
        two.faults.release()
        ends = [batch.wait(SOON).status for batch in batches]
        assert ends == [Status.CANCELLED, Status.OK, Status.CANCELLED, Status.OK]


def test_a_batch_that_waits_for_a_lane_ends_at_its_own_deadline() -> None:
    with two_engines() as two:
        two.faults.hold()
        blocking = [two.read(n * PIECE, PIECE) for n in range(2)]  # loopback has two lanes
        two.faults.wait_held(2)
        end = two.read(PIECE * 4, PIECE, timeout=0.1).wait(SOON)
        assert end.status is Status.TIMED_OUT
        assert "did not end within 0.1 s" in end.error
        assert 0.1 <= end.total_s < SOON
        two.faults.release()
        assert all(batch.wait(SOON).ok for batch in blocking)


def test_a_moving_batch_ends_at_its_deadline_although_a_longer_one_came_first() -> None:
    with two_engines() as two:
        two.faults.hold()
        longer = two.read(0, PIECE)
        shorter = two.read(PIECE, PIECE, timeout=0.1)
        assert shorter.wait(SOON).status is Status.TIMED_OUT
        two.faults.release()
        assert longer.wait(SOON).ok


def test_every_batch_ends_once_whatever_happens() -> None:
    """Failures, cancels, deadlines and a close in the middle, all at once; seeded."""
    rng = random.Random(4)
    with two_engines(length=64 * PIECE) as two:
        two.faults.slice_bytes = PIECE
        ends: list[Completion] = []
        batches = []
        for number in range(300):
            two.faults.fail(rng.choice(list(Status)[1:]), "drawn", times=rng.choice([0, 0, 1]))
            batch = two.read(timeout=rng.choice([5.0, 5.0, 0.001]))
            batch.add_done_callback(ends.append)
            batches.append(batch)
            if rng.random() < 0.3:
                rng.choice(batches).cancel()
            if number == 280:
                closing = threading.Thread(target=two.near.close)
                closing.start()
                break
        finals = [batch.wait(SOON) for batch in batches]
        closing.join(SOON)
        assert len(ends) == len(batches) == 281
        assert {id(end) for end in ends} == {id(end) for end in finals}
        assert sum(sums.batches for sums in two.near.statistics().values()) == 281


def test_held_slices_can_time_out_and_faults_say_when_nothing_is_held() -> None:
    faults = Faults()
    with pytest.raises(TimeoutError, match="0 slices are held"):
        faults.wait_held(timeout=0.01)
    faults.hold()
    with pytest.raises(LaneError, match="until its deadline"):
        faults.before_move(threading.Event(), time.monotonic() + 0.01)


def test_slow_lanes_take_their_time_and_can_be_interrupted() -> None:
    with two_engines() as two:
        two.faults.slice_bytes = PIECE
        two.faults.delay_per_slice_s = 0.02
        assert two.read(0, PIECE * 4).wait(SOON).total_s >= 0.04  # four slices on two lanes
        two.faults.delay_per_slice_s = 60.0
        batch = two.read(0, PIECE)
        assert batch.poll() is None
        batch.cancel()
        assert batch.wait(SOON).status is Status.CANCELLED


def test_a_link_that_cannot_be_made_leaves_no_segment() -> None:
    with two_engines() as two:
        record = two.far.record()
        two.far.close()
        for _ in range(2):
            with pytest.raises(PathUnavailable, match="does not live in this process"):
                two.near.open_segment(record)
