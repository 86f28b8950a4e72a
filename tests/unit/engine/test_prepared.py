"""A prepared transfer: worked out once, run any number of times, each run a transfer of its own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest
from engines import SOON, address, config, two_engines
from mooncake_engine import EngineClosed, InvalidTransfer, OutOfBounds, Status, TransferEngine
from mooncake_engine.slicing import MAX_RUNS
from mooncake_engine.types import uint64s

if TYPE_CHECKING:
    from collections.abc import Iterator

    from engines import Two

RUNS = 16
RUN = 4096


@pytest.fixture(params=["loopback", "shm", "tcp"])
def two(request: pytest.FixtureRequest) -> Iterator[Two]:
    with two_engines(protocol=request.param) as two:
        yield two
    vars(two).clear()  # pytest keeps a test's arguments longer, and so the arenas' descriptors


def rows(two: Two, first: int = 0) -> list[tuple[int, int, int]]:
    """Every other run of memory, from behind."""
    return [two.row(first + 2 * RUN * i, RUN) for i in reversed(range(RUNS))]


def moved(two: Two, first: int = 0) -> bool:
    """Whether all that `rows` names, and nothing else of that part, is what the source holds."""
    shape = RUNS, 2, RUN
    here, there = (
        memory[first : first + 2 * RUNS * RUN].reshape(shape) for memory in (two.memory, two.source)
    )
    return bool((here[:, 0] == there[:, 0]).all()) and not here[:, 1].any()


def test_each_run_moves_what_is_there_by_then_and_is_counted(two: Two) -> None:
    prepared = two.near.prepare("read", two.open(), rows(two))
    for value in range(1, 6):
        two.source[:] = value
        end = prepared.transfer() if value % 2 else prepared.submit().wait(SOON)
        assert (end.status, end.nbytes, end.descriptors) == (Status.OK, RUNS * RUN, RUNS)
        assert moved(two)
    (totals,) = two.near.statistics().values()
    assert (totals.batches, totals.nbytes, totals.runs) == (5, 5 * RUNS * RUN, 5 * RUNS)
    two.memory[:] = 77
    assert two.near.prepare("write", two.open(), rows(two)).transfer().ok
    assert (two.source == 77).sum() == RUNS * RUN


def test_more_runs_than_one_slice_takes_arrive_each_time(two: Two) -> None:
    many = [two.row(2 * i, 1) for i in range(MAX_RUNS + 500)]
    prepared = two.near.prepare("read", two.open(), many)
    for _ in range(3):
        two.memory[:] = 0
        assert prepared.transfer().ok
        np.testing.assert_array_equal(
            two.memory[: 2 * len(many) : 2], two.source[: 2 * len(many) : 2]
        )
        assert not two.memory[1 : 2 * len(many) : 2].any()


def test_the_callers_arrays_may_change_after(two: Two) -> None:
    local, remote, lengths = (uint64s(column) for column in zip(*rows(two), strict=True))
    prepared = two.near.prepare("read", two.open(), local, remote, lengths)
    local[:] = remote[:] = lengths[:] = 1
    assert prepared.transfer().ok
    assert moved(two)


def test_nothing_is_prepared_once_for_all_that_the_next_run_must_know(two: Two) -> None:
    prepared = two.near.prepare("read", two.open(), rows(two))
    assert prepared.transfer().ok
    two.near.unregister_memory(address(two.memory))
    with pytest.raises(OutOfBounds, match="this engine"):
        prepared.transfer()
    two.near.register_memory(two.memory)
    assert prepared.transfer().ok
    with pytest.raises(InvalidTransfer, match="more than 0"):
        prepared.transfer(timeout=0)
    two.near.close()
    with pytest.raises(EngineClosed):
        prepared.submit()


def test_a_run_of_memory_that_the_peer_took_back_is_refused_by_its_record() -> None:
    with two_engines() as two:
        segment = two.open()
        prepared = two.near.prepare("read", segment, rows(two))
        assert prepared.transfer().ok
        two.far.unregister_memory(address(two.source))
        assert prepared.transfer().status is Status.REFUSED  # by the peer, which knows first
        segment.update(two.far.record())
        for _ in range(2):
            with pytest.raises(OutOfBounds, match=two.far.name):
                prepared.transfer()


def test_a_peer_that_registers_something_else_meanwhile_disturbs_no_run(two: Two) -> None:
    segment = two.open()
    prepared = two.near.prepare("read", segment, rows(two))
    two.far.allocate(RUN)
    segment.update(two.far.record())
    assert prepared.transfer().ok
    assert moved(two)


def test_memory_that_a_run_uses_cannot_be_unregistered() -> None:
    with two_engines() as two:
        prepared = two.near.prepare("read", two.open(), rows(two))
        two.faults.hold()
        batch = prepared.submit()
        two.faults.wait_held()
        with pytest.raises(InvalidTransfer, match="cancel the batch and wait"):
            two.near.unregister_memory(address(two.memory))
        batch.cancel()
        assert batch.wait(SOON).status is Status.CANCELLED
        two.faults.release()
        assert prepared.transfer().ok


def test_each_run_has_its_own_deadline() -> None:
    with two_engines() as two:
        prepared = two.near.prepare("read", two.open(), rows(two))
        two.faults.hold()
        assert prepared.transfer(timeout=0.1).status is Status.TIMED_OUT
        two.faults.release()
        assert prepared.transfer().ok


@pytest.mark.parametrize("protocol", ["shm", "tcp"])
def test_a_peer_that_closed_its_engine_is_gone_for_the_next_run(protocol: str) -> None:
    with two_engines(protocol=protocol) as two:
        prepared = two.near.prepare("read", two.open(), rows(two))
        assert prepared.transfer().ok
        source = two.source  # the process lives on, and so does this memory
        two.far.close()
        assert source.any()
        for _ in range(2):
            assert prepared.transfer().status is Status.PEER_GONE


def test_runs_of_a_closed_segment_and_of_a_restarted_peer_end_so() -> None:
    with two_engines() as two:
        segment = two.open()
        prepared = two.near.prepare("read", segment, rows(two))
        segment.close()
        assert prepared.transfer().status is Status.CANCELLED
        again = two.near.prepare("read", two.open(), rows(two))
        with TransferEngine(config()) as reborn:
            two.near.open_segment(msgspec.structs.replace(reborn.record(), name=two.far.name))
            assert again.transfer().status is Status.PEER_GONE


def test_a_prepared_transfer_of_nothing_ends_at_once(two: Two) -> None:
    prepared = two.near.prepare("read", two.open(), [])
    end = prepared.submit().poll()
    assert end is not None
    assert end.ok
    assert prepared.transfer().nbytes == 0


def test_several_threads_may_run_it_at_once(two: Two) -> None:
    """Readers of one memory race for nothing but what the engine keeps for the transfer."""
    prepared = two.near.prepare("read", two.open(), rows(two))

    def run(_number: int) -> None:
        for _ in range(100):
            assert prepared.transfer().ok

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4)))
    assert moved(two)
    assert sum(totals.batches for totals in two.near.statistics().values()) == 400
