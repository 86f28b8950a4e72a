"""A slice's account: what is under way, what came back failed, and no wake-up lost."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from mooncake_engine.transport.rdma.job import Job

if TYPE_CHECKING:
    from collections.abc import Callable

FOR_EVER = 60.0


def job_of(*sizes: int) -> Job:
    job = Job()
    job.begin(np.array(sizes, np.uint64))
    return job


@given(
    st.lists(st.integers(1, 1000), min_size=1, max_size=30),
    st.data(),
    st.integers(0, 5000),
)
def test_a_chain_takes_as_many_requests_as_fit_and_one_at_least(
    sizes: list[int], data: st.DataObject, nbytes: int
) -> None:
    job = job_of(*sizes)
    start = data.draw(st.integers(0, len(sizes) - 1))
    stop = data.draw(st.integers(start + 1, len(sizes)))
    found = job.within(slice(start, stop), nbytes)
    assert found.start == start
    assert start < found.stop <= stop
    assert job.bytes_of(found) == sum(sizes[found])
    assert found.stop == start + 1 or sum(sizes[found]) <= nbytes
    assert found.stop == stop or sum(sizes[start : found.stop + 1]) > nbytes


def test_it_is_quiet_when_all_is_back_and_what_failed_was_taken() -> None:
    job = job_of(10, 20, 30)
    assert job.quiet
    job.posted(slice(0, 3))
    assert (job.under_way, job.bytes_under_way, job.quiet) == (3, 60, False)
    job.returned(slice(1, 3))
    assert (job.under_way, job.bytes_under_way, job.quiet) == (1, 10, False)
    job.returned(slice(0, 1))
    assert job.quiet
    assert job.take_failed() == []


def _within(seconds: float, action: Callable[[], object]) -> bool:
    began = time.monotonic()
    action()
    return time.monotonic() - began < seconds


def test_a_wake_up_before_the_wait_ends_it_at_once_and_is_used_up() -> None:
    job = job_of(1)
    job.wake()
    assert job.woken
    assert _within(FOR_EVER / 2, lambda: job.wait(time.monotonic() + FOR_EVER))
    assert not job.woken
    until = time.monotonic() + 0.05
    job.wait(until)
    assert time.monotonic() >= until


def test_what_comes_back_ends_the_wait_of_another_thread() -> None:
    job = job_of(1, 1)
    job.posted(slice(0, 2))
    waited = threading.Event()

    def wait() -> None:
        job.wait(time.monotonic() + FOR_EVER)
        waited.set()

    waiter = threading.Thread(target=wait)
    waiter.start()
    job.returned(slice(0, 2))
    assert waited.wait(FOR_EVER / 2)
    waiter.join()


def test_no_wake_up_is_lost_between_two_threads() -> None:
    """Each request is posted when the one before is known to be back, without a time-out."""
    rounds = 2000
    job = job_of(*[1] * rounds)
    posted: list[int] = []
    told = threading.Condition()

    def complete() -> None:
        for row in range(rounds):
            with told:
                told.wait_for(lambda row=row: len(posted) > row)  # type: ignore[misc]  # binds now
            job.returned(slice(row, row + 1))

    nic = threading.Thread(target=complete)
    nic.start()
    end = time.monotonic() + FOR_EVER / 2
    for row in range(rounds):
        job.posted(slice(row, row + 1))
        with told:
            posted.append(row)
            told.notify()
        while job.under_way:
            job.wait(end)
            assert time.monotonic() < end, f"nobody woke it after request {row}"
    nic.join()
    assert job.quiet
