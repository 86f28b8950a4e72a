from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest
from engines import SOON, address, config, two_engines
from mooncake_engine import (
    EngineClosed,
    InvalidTransfer,
    MetadataConfig,
    MetadataError,
    Op,
    OutOfBounds,
    Status,
    TransferEngine,
    UnknownSegment,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from engines import Two
    from mooncake_engine import Batch, Completion


@pytest.fixture
def two() -> Iterator[Two]:
    with two_engines() as two:
        yield two


def test_a_read_brings_the_bytes_and_says_how_it_went(two: Two) -> None:
    end = two.read(100, 1000).wait(SOON)
    assert end.ok
    assert (end.nbytes, end.descriptors, end.runs, end.path.scheme) == (1000, 1, 1, "loopback")
    assert 0 <= end.queued_s <= end.total_s < SOON
    np.testing.assert_array_equal(two.memory[100:1100], two.source[100:1100])
    assert not two.memory[:100].any()
    assert not two.memory[1100:].any()


def test_a_write_takes_the_bytes_there(two: Two) -> None:
    two.memory[:] = 9
    local, remote, _ = two.row()
    batch = two.near.submit(Op.WRITE, two.open(), [local], [remote + 5], [7])
    assert batch.wait(SOON).ok
    assert (two.source[5:12] == 9).all()


def test_arrays_and_tuples_mean_the_same(two: Two) -> None:
    local, remote, _ = two.row()
    arrays = [np.array(column, np.uint64) for column in ([local], [remote], [10])]
    assert two.near.submit("read", two.open(), *arrays).wait(SOON).nbytes == 10
    assert two.near.submit("read", two.open(), [(local, remote, 10)]).wait(SOON).nbytes == 10


def test_an_empty_batch_has_ended_when_submit_returns(two: Two) -> None:
    for arguments in ([],), ([], [], []):
        end = two.near.submit("read", two.open(), *arguments).poll()
        assert end is not None
        assert (end.status, end.nbytes, end.runs) == (Status.OK, 0, 0)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        (([1, 2], [1], [1]), "equally long, got 2, 1 and 1"),
        (([(1, 2)],), "tuples"),
        (([1], [1], [0]), "run 0 of 1 has length 0"),
        (([1], [1], [-5]), "-5"),
        (([(1, 1, -5)],), "cannot read"),
        (([1.5], [1], [1]), "integers"),
        (([[1]], [[1]], [[1]]), "dimension"),
        (([1], [1]), "give local, remote and lengths"),
        ((7,), "cannot read"),
    ],
)
def test_arrays_that_describe_no_transfer_are_refused(
    two: Two, arrays: tuple[list[int], ...], says: str
) -> None:
    with pytest.raises(InvalidTransfer, match=says):
        two.near.submit("read", two.open(), *arrays)


def test_an_unknown_operation_and_a_time_of_zero_are_refused(two: Two) -> None:
    with pytest.raises(InvalidTransfer, match="'copy': use 'read' or 'write'"):
        two.near.submit("copy", two.open(), [])
    with pytest.raises(InvalidTransfer, match="cannot have 0 s"):
        two.read(timeout=0)


def test_destinations_may_not_overlap_but_sources_may(two: Two) -> None:
    local, remote, _ = two.row()
    twice = [(local, remote, 10), (local + 20, remote + 5, 10)]
    assert two.near.submit("read", two.open(), twice).wait(SOON).ok
    with pytest.raises(InvalidTransfer, match="overlap in their destination"):
        two.near.submit("write", two.open(), twice)


def test_addresses_thatcompletion_of_around_are_out_of_bounds(two: Two) -> None:
    local, remote, _ = two.row()
    top = 2**64 - 8
    rows = [
        [(local, remote, 2**64 - 1)],
        [(top, remote, 16)],
        [(local, top, 16)],
        [(top, remote, 8), (0, remote + 8, local + 1)],
        [(local, remote, 2**63), (local + 2**63, remote + 2**63, 2**63 + 4)],
    ]
    for op in Op:
        for bad in rows:
            with pytest.raises(OutOfBounds):
                two.near.submit(op, two.open(), bad)


def test_memory_that_the_peer_registered_later_is_found(two: Two) -> None:
    segment = two.open()
    more = two.far.allocate(4096)
    more[:] = 3
    assert two.near.submit("read", segment, [(two.row()[0], address(more), 4096)]).wait(SOON).ok
    assert (two.memory[:4096] == 3).all()


def test_memory_that_the_peer_took_back_is_refused_by_the_peer(two: Two) -> None:
    segment = two.open()
    two.far.unregister_memory(address(two.source))
    end = two.near.submit("read", segment, [two.row()]).wait(SOON)
    assert end.status is Status.REFUSED
    assert "registered" in end.error


def test_a_closed_engine_takes_nothing_more() -> None:
    with two_engines() as two:
        segment = two.open()
        two.near.close()
        two.near.close()
        for refused in (
            lambda: two.near.submit("read", segment, [two.row()]),
            lambda: two.near.register_memory(1, 1),
            lambda: two.near.open_segment(two.far.record()),
            lambda: two.near.grant(b"x"),
        ):
            with pytest.raises(EngineClosed, match="closed"):
                refused()


def test_a_closed_segment_ends_its_batches_and_opens_anew(two: Two) -> None:
    two.faults.hold()
    segment = two.open()
    assert two.open() is segment
    batch = two.read()
    two.faults.wait_held()
    segment.close()
    assert batch.wait(SOON).status is Status.CANCELLED
    late = two.near.submit("read", segment, [two.row()]).wait(SOON)
    assert late.status is Status.CANCELLED
    assert "closed" in late.error
    two.faults.release()
    assert two.open() is not segment
    assert two.read().wait(SOON).ok


def test_a_restarted_peer_ends_the_batches_to_its_former_self() -> None:
    with two_engines() as two:
        two.faults.hold()
        old = two.near.open_segment(two.far.record())
        batch = two.near.submit("read", old, [two.row()])
        two.faults.wait_held()
        with TransferEngine(config()) as reborn:
            record = msgspec.structs.replace(reborn.record(), name=two.far.name)
            new = two.near.open_segment(record)
            assert new.incarnation == reborn.incarnation
            end = batch.wait(SOON)
        assert end.status is Status.PEER_GONE
        assert "restarted" in end.error
        assert two.near.submit("read", old, [two.row()]).wait(SOON).status is Status.PEER_GONE


def test_a_name_that_nobody_has_is_told_apart_from_a_store_that_does_not_answer(two: Two) -> None:
    with TransferEngine(config(metadata=MetadataConfig(backend="memory"))) as engine:
        with pytest.raises(UnknownSegment, match="no segment is called 'nobody'"):
            engine.open_segment("nobody")
        engine.store.put("segments/odd", b"\xc1")
        with pytest.raises(MetadataError, match="record of segment 'odd' cannot be read"):
            engine.open_segment("odd")
        engine.store.delete("segments/odd")
    with TransferEngine(config()) as gone:
        name = gone.name
    with pytest.raises(MetadataError, match=name):
        two.near.open_segment(name)


def test_counters_add_up_by_direction_and_status(two: Two) -> None:
    two.read(0, 10).wait(SOON)
    two.read(0, 20).wait(SOON)
    two.faults.fail(Status.FAILED, "broken")
    two.read(0, 5).wait(SOON)
    sums = two.near.statistics()
    ok = sums[("loopback", Op.READ, Status.OK)]
    assert (ok.batches, ok.nbytes, ok.descriptors, ok.runs) == (2, 30, 2, 2)
    assert ok.seconds > 0
    assert sums[("loopback", Op.READ, Status.FAILED)].batches == 1
    assert len(sums) == 2


def test_a_batch_can_be_awaited_from_several_loops(two: Two) -> None:
    async def main() -> None:
        two.faults.hold()
        batch = two.read()
        waiting = [asyncio.ensure_future(completion_of(batch)) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        two.faults.release()
        assert (await asyncio.wait_for(waiting[1], SOON)).ok
        assert (await waiting[2]).ok
        assert (await batch).ok
        assert waiting[0].cancelled()

    asyncio.run(main())


def test_a_loop_that_closed_meanwhile_harms_nobody(two: Two) -> None:
    two.faults.hold()
    batch = two.read()
    loop = asyncio.new_event_loop()
    with pytest.raises(TimeoutError):
        loop.run_until_complete(asyncio.wait_for(completion_of(batch), 0.01))
    loop.close()
    two.faults.release()
    assert batch.wait(SOON).ok
    assert two.read().wait(SOON).ok


async def completion_of(batch: Batch) -> Completion:
    return await batch
