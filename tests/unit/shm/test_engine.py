"""What a user of the engine gets: small batches at once, and where process_vm is forbidden."""

from __future__ import annotations

import hashlib
import threading
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest
from engines import SOON, config
from mooncake_engine import EngineClosed, InvalidTransfer, Op, OutOfBounds, Status
from mooncake_engine.crowding import BELIEVED_S, LONG_NS, Crowding
from mooncake_engine.engine import TransferEngine
from mooncake_engine.iovec import address_of
from shm_child import engine_config

if TYPE_CHECKING:
    from collections.abc import Callable

    from mooncake_engine import Completion
    from shm_peers import Child

MIB = 1 << 20


def test_allocated_memory_goes_over_shm_and_any_other_over_tcp(
    child: Callable[..., Child],
) -> None:
    elsewhere = np.full(MIB, 5, np.uint8)
    with TransferEngine(engine_config()) as engine:
        allocated = engine.allocate(MIB)
        allocated[:] = 6
        for array, path in ((allocated, "shm"), (elsewhere, "tcp")):
            if array is elsewhere:
                engine.register_memory(array)
            reader = child("engine")  # a new one: it chooses its path by what is registered now
            record = msgspec.msgpack.encode(engine.record()).hex()
            got = reader.do("read", record=record, remote=address_of(array), length=MIB)
            assert got == [path, "ok", hashlib.blake2b(array.tobytes()).hexdigest()]
            reader.do("close")


@pytest.mark.parametrize("op", list(Op))
@pytest.mark.parametrize("runs", [1, 16, 1023, 1024, 1025])
def test_a_small_batch_has_ended_when_submit_returns(op: Op, runs: int) -> None:
    with TransferEngine(config("shm")) as far, TransferEngine(config("shm")) as near:
        ours, theirs = near.allocate(8 * runs), far.allocate(8 * runs)
        source, sink = (theirs, ours) if op is Op.READ else (ours, theirs)
        source[:] = np.arange(8 * runs) % 251
        order = np.arange(0, 8 * runs, 8, dtype=np.uint64)
        lengths = np.full(runs, 7, np.uint64)  # the eighth is nobody's
        batch = near.submit(
            op,
            near.open_segment(far.name),
            address_of(ours) + order,
            address_of(theirs) + order,
            lengths,
        )
        if runs <= 1024:  # else it is two slices
            assert batch.poll() is not None
        assert batch.wait(10).ok
        want = source.reshape(-1, 8).copy()
        want[:, 7] = 0
        assert np.array_equal(sink.reshape(-1, 8), want)


@pytest.mark.parametrize("op", list(Op))
def test_a_small_batch_finds_out_that_the_peer_has_closed(op: Op) -> None:
    with TransferEngine(config("shm")) as near:
        with TransferEngine(config("shm")) as far:
            theirs = np.zeros(64, np.uint8)  # stays mapped, unlike what `allocate` gives
            far.register_memory(theirs)
            ours = near.allocate(64)
            ours[:] = 1
            segment = near.open_segment(far.name)
            row = [(address_of(ours), address_of(theirs), 64)]
            assert near.transfer("read", segment, row).ok
        for _ in range(2):  # a spent lane is replaced
            assert near.submit(op, segment, row).wait(SOON).status is Status.PEER_GONE
        assert not theirs.any()


@pytest.mark.parametrize("how", ["transfer", "submit", "prepared"])
def test_what_is_moved_at_once_is_checked_and_counted_as_any_other(how: str) -> None:
    with TransferEngine(config("shm")) as far, TransferEngine(config("shm")) as near:
        ours, theirs = near.allocate(64), far.allocate(64)
        theirs[:] = 3
        segment = near.open_segment(far.name)
        row = [(address_of(ours), address_of(theirs), 64)]
        prepared = near.prepare("read", segment, row)

        def end(timeout: float | None = None) -> Completion:
            if how == "prepared":
                return prepared.transfer(timeout)
            if how == "submit":
                return near.submit("read", segment, row, timeout=timeout).wait(SOON)
            return near.transfer("read", segment, row, timeout=timeout)

        first = end()
        assert (first.ok, first.nbytes, first.runs, first.path.scheme) == (True, 64, 1, "shm")
        assert (ours == 3).all()
        assert [totals.batches for totals in near.statistics().values()] == [1]
        with pytest.raises(InvalidTransfer, match="cannot have -1 s"):
            end(-1)

        near.unregister_memory(address_of(ours))
        with pytest.raises(OutOfBounds, match=r"lie outside|no registered memory"):
            end()
        near.register_memory(ours)
        assert end().ok
        segment.close()
        assert end().status is Status.CANCELLED
        near.close()
        with pytest.raises(EngineClosed):
            end()


def test_a_long_wait_for_the_interpreter_lock_is_believed_for_a_while() -> None:
    crowding = Crowding()
    assert not crowding.crowded
    crowding.waited(LONG_NS)
    assert not crowding.crowded
    crowding.waited(LONG_NS + 1)
    assert crowding.crowded
    threading.Event().wait(BELIEVED_S)
    assert not crowding.crowded
