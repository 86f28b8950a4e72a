"""The calling thread does a lane's work in `transfer`."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pytest
from engines import SOON, two_engines
from mooncake_engine import EngineClosed, InvalidTransfer, Op, OutOfBounds, Status
from mooncake_engine.worker import LinkWorker
from recording_link import PIECE, RecordingLink, batch_of, close

if TYPE_CHECKING:
    from collections.abc import Iterator

    from engines import Two
    from mooncake_engine import Completion
    from mooncake_engine.types import Slice


@pytest.fixture
def two() -> Iterator[Two]:
    """Two engines with one idle lane between them."""
    with two_engines() as two:
        assert transfer(two, 0, 1).ok
        yield two


def transfer(two: Two, first: int = 0, length: int | None = None, **how: float) -> Completion:
    return two.near.transfer("read", two.open(), [two.row(first, length)], **how)


def warm(worker: LinkWorker) -> None:
    """A lane is open and idle."""
    batch = batch_of(worker, 1)
    worker.submit(batch)
    assert batch.wait(SOON).ok
    for _ in range(100):  # the thread sleeps soon after it ended the batch
        with worker._lock:
            if len(worker._idle):
                return
        threading.Event().wait(0.01)
    raise AssertionError("the lane's thread does not become idle")


def test_a_transfer_moves_the_bytes_and_returns_how_it_went(two: Two) -> None:
    end = transfer(two, 100, 1000)
    assert (end.status, end.nbytes, end.descriptors, end.runs) == (Status.OK, 1000, 1, 1)
    np.testing.assert_array_equal(two.memory[100:1100], two.source[100:1100])
    two.memory[:] = 7
    assert two.near.transfer(Op.WRITE, two.open(), [two.row(5, 6)]).ok
    assert (two.source[5:11] == 7).all()
    assert two.near.transfer("read", two.open(), []).nbytes == 0


def test_a_transfer_is_counted_and_refused_as_a_submit_is(two: Two) -> None:
    before = sum(totals.batches for totals in two.near.statistics().values())
    assert transfer(two, 0, 10).ok
    assert sum(totals.batches for totals in two.near.statistics().values()) == before + 1
    with pytest.raises(InvalidTransfer, match="length 0"):
        two.near.transfer("read", two.open(), [two.row(0, 0)])
    with pytest.raises(OutOfBounds):
        two.near.transfer("read", two.open(), [two.row(0, two.memory.size + 1)])
    segment = two.open()
    two.near.close()
    with pytest.raises(EngineClosed):
        two.near.transfer("read", segment, [two.row(0, 1)])


def test_the_calling_thread_moves_a_slice_when_a_lane_is_idle() -> None:
    link = RecordingLink()
    worker = LinkWorker(link, "test")
    warm(worker)
    link.movers.clear()
    batch = batch_of(worker, 3)
    worker.transfer(batch)
    end = batch.poll()
    assert end is not None
    assert end.ok
    assert link.movers == [threading.current_thread()] * 3
    assert len(link.open_lanes) == 1
    close(worker)
    assert not link.open_lanes


def test_the_calling_thread_shares_a_big_batch_with_the_other_lanes() -> None:
    together = threading.Barrier(2)
    link = RecordingLink(lanes=2)
    worker = LinkWorker(link, "test")
    warm(worker)
    link.movers.clear()
    link.do = lambda _piece: together.wait(SOON) and None
    batch = batch_of(worker, 6)  # the barrier lets nobody through unless two move at once
    worker.transfer(batch)
    assert batch.wait(SOON).ok
    assert link.movers.count(threading.current_thread()) == 3
    assert len(link.open_lanes) == 2
    close(worker)


def test_the_calling_thread_leaves_its_lane_to_a_batch_that_waits_for_one() -> None:
    link = RecordingLink(lanes=1)
    worker = LinkWorker(link, "test")
    warm(worker)
    link.moved.clear()
    ends: list[int] = []
    small = batch_of(worker, 1, lambda _end: ends.append(len(link.moved)))

    def submit_small(_piece: Slice) -> None:
        link.do = lambda _piece: None
        worker.submit(small)

    link.do = submit_small
    big = batch_of(worker, 1000)
    worker.transfer(big)
    assert big.wait(SOON).ok
    assert small.wait(SOON).ok
    assert ends[0] <= 3, f"the small batch ended after {ends[0]} slices"
    assert threading.current_thread() not in link.movers[-900:]
    close(worker)


def test_a_borrowed_lane_is_not_taken_for_idle() -> None:
    link = RecordingLink()
    worker = LinkWorker(link, "test", idle_s=0.2)
    warm(worker)
    (lane,) = link.open_lanes
    link.do = lambda _piece: threading.Event().wait(0.5) and None
    batch = batch_of(worker, 1)
    worker.transfer(batch)
    assert batch.wait(SOON).ok
    assert link.open_lanes == {lane}
    close(worker)


def test_a_lane_that_broke_under_the_calling_thread_is_replaced() -> None:
    def interrupt(_piece: Slice) -> None:
        raise KeyboardInterrupt

    link = RecordingLink()
    worker = LinkWorker(link, "test")
    warm(worker)
    link.do = interrupt
    batch = batch_of(worker, 1)
    with pytest.raises(KeyboardInterrupt):
        worker.transfer(batch)
    end = batch.poll()
    assert end is not None
    assert (end.status, end.error) == (Status.CANCELLED, "the caller was interrupted")
    link.do = lambda _piece: None
    again = batch_of(worker, 1)
    worker.transfer(again)
    assert again.wait(SOON).ok
    close(worker)
    assert not link.open_lanes


def test_a_peer_that_dies_meanwhile_ends_the_transfer_and_not_the_next(two: Two) -> None:
    two.faults.fail(Status.PEER_GONE, "hung up")
    end = transfer(two, 0, 10)
    assert (end.status, end.error) == (Status.PEER_GONE, "hung up")
    assert transfer(two, 0, 10).ok
    assert two.faults.opened == 2


def test_a_transfer_ends_at_its_deadline(two: Two) -> None:
    two.faults.hold()
    assert transfer(two, 0, 10, timeout=0.1).status is Status.TIMED_OUT
    two.faults.release()
    assert transfer(two, 0, 10).ok


@pytest.mark.parametrize("what", ["engine", "segment"])
def test_closing_interrupts_the_calling_thread_and_waits_until_it_let_go(
    two: Two, what: str
) -> None:
    segment = two.open()
    two.faults.hold(stubborn=True)  # lanes that do not heed the interrupt
    with ThreadPoolExecutor(2) as pool:
        moving = pool.submit(transfer, two)
        two.faults.wait_held()
        closing = pool.submit(two.near.close if what == "engine" else segment.close)
        with pytest.raises(TimeoutError):
            closing.result(0.2)
        assert not moving.done()
        two.faults.release()
        assert moving.result(SOON).status is Status.CANCELLED
        closing.result(SOON)


def test_memory_that_the_calling_thread_moves_cannot_be_unregistered(two: Two) -> None:
    two.faults.hold()
    region, *_ = (r.address for r in two.near.record().regions)
    with ThreadPoolExecutor(1) as pool:
        moving = pool.submit(transfer, two)
        two.faults.wait_held()
        with pytest.raises(InvalidTransfer, match="cancel the batch and wait"):
            two.near.unregister_memory(region)
        two.faults.release()
        assert moving.result(SOON).ok
    two.near.unregister_memory(region)


def test_threads_transfer_at_once(two: Two) -> None:
    two.faults.slice_bytes = PIECE
    share = two.memory.size // 8

    def read(number: int) -> None:
        for _ in range(20):
            assert transfer(two, number * share, share).ok

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(8)))
    np.testing.assert_array_equal(two.memory, two.source)


def test_a_done_callback_may_transfer(two: Two) -> None:
    ends: list[Completion] = []
    heard = threading.Event()
    segment = two.open()

    def again(_end: Completion) -> None:
        ends.append(two.near.transfer("read", segment, [two.row(0, 10)]))
        heard.set()

    two.faults.hold()
    batch = two.read(0, PIECE)
    batch.add_done_callback(again)
    two.faults.release()
    assert heard.wait(SOON)
    assert ends[0].ok
