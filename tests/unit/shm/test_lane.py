"""Slices between processes, by pid ("plain" memory) and over a mapping ("arena" memory)."""

from __future__ import annotations

import hashlib
import mmap
import os
import signal
import threading
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
from mooncake_engine.errors import LaneError
from mooncake_engine.iovec import address_of
from mooncake_engine.types import Op, Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from shm_peers import Child, Reached

MIB = 1 << 20
both_ways = pytest.mark.parametrize("memory", ["plain", "arena"])
both_ops = pytest.mark.parametrize("op", [Op.READ, Op.WRITE])


def digest(array: NDArray[np.uint8]) -> str:
    return hashlib.blake2b(array.tobytes()).hexdigest()


def scatter(size: int, runs: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(offsets, lengths) of disjoint runs in random order, some of one byte."""
    rng = np.random.default_rng(runs)
    cuts = np.sort(rng.choice(size, 2 * runs, replace=False))
    offsets, lengths = cuts[::2], cuts[1::2] - cuts[::2]
    lengths[rng.random(runs) < 0.2] = 1
    order = rng.permutation(runs)
    return offsets[order], lengths[order]


@both_ways
def test_scattered_runs_arrive_exactly_in_both_directions(
    child: Callable[..., Child], reach: Callable[..., Reached], memory: str
) -> None:
    size = 4 * MIB
    target = child("target", **{memory: size})
    reached = reach(target, memory)
    want = target.content(size)
    for runs in (1, 37, 1024, 5000):
        theirs, lengths = scatter(size, runs)
        ours = np.cumsum(lengths) - lengths
        here = np.zeros(int(lengths.sum()) + 8, np.uint8)  # the last 8 are nobody's
        local, remote = address_of(here) + ours, target.about[memory] + theirs

        reached.move(Op.READ, local, remote, lengths)
        parts = [want[a : a + n] for a, n in zip(theirs, lengths, strict=True)]
        assert np.array_equal(here, np.concatenate([*parts, np.zeros(8)]))

        here[:] = np.random.default_rng(runs).integers(0, 256, here.size, np.uint8)
        reached.move(Op.WRITE, local, remote, lengths)
        for a, o, n in zip(theirs, ours, lengths, strict=True):
            want[a : a + n] = here[o : o + n]
        assert target.do("digest", which=memory) == digest(want)


@both_ways
def test_a_run_of_64_mib_and_one_of_a_byte_arrive_in_one_slice(
    child: Callable[..., Child], reach: Callable[..., Reached], memory: str
) -> None:
    size = 64 * MIB + 1
    target = child("target", **{memory: size})
    here = np.zeros(size, np.uint8)
    local, remote = address_of(here), target.about[memory]
    reach(target, memory).move(
        Op.READ, [local, local + 1], [remote + size - 1, remote], [1, size - 1]
    )
    want = target.content(size)
    assert here[0] == want[-1]
    assert np.array_equal(here[1:], want[:-1])


@both_ops
def test_a_run_that_ends_in_unmapped_memory_is_refused_and_the_lane_lives_on(
    child: Callable[..., Child], reach: Callable[..., Reached], op: Op
) -> None:
    target = child("target", plain=4 * MIB)
    reached = reach(target)
    here = np.zeros(4 * MIB, np.uint8)
    remote = target.about["plain"]
    target.do("unmap_half")
    with pytest.raises(LaneError, match=f"{remote + 2 * MIB:#x}.*has no such memory") as caught:
        reached.move(op, [address_of(here)], [remote], [4 * MIB])
    assert caught.value.status is Status.REFUSED
    reached.move(op, [address_of(here)], [remote], [2 * MIB])


@both_ops
def test_unmapped_local_memory_is_told_from_unmapped_remote_memory(
    child: Callable[..., Child], reach: Callable[..., Reached], op: Op
) -> None:
    gone = mmap.mmap(-1, MIB)
    address = address_of(np.frombuffer(gone, np.uint8))
    gone.close()
    target = child("target", plain=MIB)
    with pytest.raises(LaneError, match="local memory at") as caught:
        reach(target).move(op, [address], [target.about["plain"]], [4096])
    assert caught.value.status is Status.FAILED


@both_ways
@both_ops
def test_a_peer_that_was_killed_is_gone(
    child: Callable[..., Child], reach: Callable[..., Reached], memory: str, op: Op
) -> None:
    target = child("target", **{memory: MIB})
    reached = reach(target, memory)
    target.kill()
    here = np.zeros(MIB, np.uint8)
    with pytest.raises(LaneError) as caught:
        reached.move(op, [address_of(here)], [target.about[memory]], [MIB])
    assert caught.value.status is Status.PEER_GONE


class LongRead:
    """One slice of 62 GiB: seconds of copying the same 64 MiB, to act in the middle of it."""

    def __init__(self, reached: Reached, remote: int) -> None:
        count, size = 1000, 64 * MIB
        self.here = np.zeros(size, np.uint8)
        self._status = None
        runs = [address_of(self.here)] * count, [remote] * count, [size] * count

        def run() -> None:
            try:
                reached.move(Op.READ, *runs, seconds=50)
            except LaneError as error:
                self._status = error.status

        self._thread = threading.Thread(target=run)
        self._thread.start()

    def wait_until_it_copies(self) -> None:
        deadline = time.monotonic() + 20
        pause = threading.Event()
        while not self.here[-100:].any():  # random bytes arrive here
            assert time.monotonic() < deadline
            pause.wait(0.001)

    def end(self) -> Status | None:
        self._thread.join(30)
        assert not self._thread.is_alive()
        return self._status


@both_ways
def test_a_peer_killed_in_the_middle_of_a_slice_is_gone_at_once(
    child: Callable[..., Child], reach: Callable[..., Reached], memory: str
) -> None:
    target = child("target", **{memory: 64 * MIB})
    long = LongRead(reach(target, memory), target.about[memory])
    long.wait_until_it_copies()
    start = time.monotonic()
    os.kill(target.process.pid, signal.SIGKILL)
    assert long.end() is Status.PEER_GONE
    assert time.monotonic() - start < 10  # milliseconds on a quiet machine


@both_ways
def test_a_peer_that_closes_its_engine_is_gone_although_its_process_lives(
    child: Callable[..., Child], reach: Callable[..., Reached], memory: str
) -> None:
    target = child("target", **{memory: MIB})
    reached = reach(target, memory)
    here = np.zeros(MIB, np.uint8)
    target.do("close")
    with pytest.raises(LaneError) as caught:
        reached.move(Op.READ, [address_of(here)], [target.about[memory]], [MIB])
    assert caught.value.status is Status.PEER_GONE
    assert target.process.poll() is None


@both_ways
def test_an_interrupt_ends_a_move_in_its_middle_and_the_lane_is_spent(
    child: Callable[..., Child], reach: Callable[..., Reached], memory: str
) -> None:
    target = child("target", **{memory: 64 * MIB})
    reached = reach(target, memory)
    long = LongRead(reached, target.about[memory])
    long.wait_until_it_copies()
    start = time.monotonic()
    reached.lane.interrupt()
    assert long.end() is Status.CANCELLED
    assert time.monotonic() - start < 10  # 8 MiB take 2 ms, but a busy machine may be late
    with pytest.raises(LaneError, match="interrupted"):
        reached.move(Op.READ, [address_of(long.here)], [target.about[memory]], [1])


def test_a_slice_past_its_deadline_times_out(
    child: Callable[..., Child], reach: Callable[..., Reached]
) -> None:
    target = child("target", plain=MIB)
    here = np.zeros(MIB, np.uint8)
    with pytest.raises(LaneError, match="out of time") as caught:
        reach(target).move(Op.READ, [address_of(here)], [target.about["plain"]], [MIB], seconds=-1)
    assert caught.value.status is Status.TIMED_OUT


def test_a_lane_to_a_pid_that_was_given_away_reads_and_writes_nothing(
    child: Callable[..., Child], reach: Callable[..., Reached]
) -> None:
    target, other = child("target", plain=MIB), child("target", plain=MIB)
    # As if the kernel had given the pid anew.
    reached = reach(target, pid=other.about["pid"])
    before = other.do("digest", which="plain")
    here = np.zeros(MIB, np.uint8)
    for op in (Op.WRITE, Op.READ):  # what a read brings would look unchanged when written back
        with pytest.raises(LaneError, match="is not the one") as caught:
            reached.move(op, [address_of(here)], [other.about["plain"]], [MIB])
        assert caught.value.status is Status.PEER_GONE
    assert other.do("digest", which="plain") == before
