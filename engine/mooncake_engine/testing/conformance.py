"""What every transport must do, as plain functions; pytest is not needed to run them.

    for check in conformance.CHECKS:
        with make_pair(check.length) as pair:
            if check.applies(pair):
                check.run(pair)

`make_pair` gives two live engines over the transport in question; see `Pair`.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np

from mooncake_engine.errors import OutOfBounds
from mooncake_engine.testing.faults import Faults, install
from mooncake_engine.testing.target import ChildTarget, digest, pattern
from mooncake_engine.types import Op, RegionRecord, Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from mooncake_engine.batch import Batch
    from mooncake_engine.engine import TransferEngine
    from mooncake_engine.segment import Segment
    from mooncake_engine.testing.target import Target
    from mooncake_engine.types import Completion, Uint64s

MIB = 1 << 20
#: No check waits longer for one completion. A vanished process must be noticed within it.
LIMIT_S = 20.0
#: base.py: an interrupted move raises within 100 ms; the rest is for a busy machine.
PROMPT_S = 2.0


class Pair:
    """An initiator with local memory as large as the target's region, and that target."""

    def __init__(
        self, initiator: TransferEngine, target: Target, *, target_has_a_say: bool
    ) -> None:
        """Args: target_has_a_say: its own code serves bytes (tcp), so that it can refuse."""
        self.initiator = initiator
        self.target = target
        self.target_has_a_say = target_has_a_say
        self.memory: NDArray[np.uint8] = initiator.allocate(target.length)
        self.address = int(self.memory.__array_interface__["data"][0])
        self.faults = Faults()
        install(initiator, self.faults)

    def open(self) -> Segment:
        """A segment to the target; faults asked for before apply."""
        return self.initiator.open_segment(self.target.record)

    def fill(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Fill both sides; returns what local and remote memory hold, as copies."""
        self.target.fill(1)
        self.memory[:] = pattern(2, self.memory.size)
        return self.memory.copy(), pattern(1, self.target.length).copy()

    def submit(self, op: Op, segment: Segment, runs: Runs, grant: bytes = b"") -> Batch:
        """Submit runs given as offsets."""
        return self.initiator.submit(op, segment, *self._addresses(runs), grant=grant)

    def transfer(self, op: Op, segment: Segment, runs: Runs) -> Completion:
        """Move runs given as offsets, on this thread where that can be."""
        return self.initiator.transfer(op, segment, *self._addresses(runs))

    def _addresses(self, runs: Runs) -> Runs:
        here, there = np.uint64(self.address), np.uint64(self.target.address)
        return Runs(runs.local + here, runs.remote + there, runs.lengths)


class Runs(NamedTuple):
    """Offsets into both regions, and lengths."""

    local: Uint64s
    remote: Uint64s
    lengths: Uint64s


class Check(NamedTuple):
    """One promise. `length`: bytes of region that it needs on each side."""

    run: Callable[[Pair], None]
    length: int
    needs_child: bool
    needs_say: bool

    @property
    def name(self) -> str:
        """A sentence."""
        return self.run.__name__

    def applies(self, pair: Pair) -> bool:
        """Whether this pair can show it."""
        return (not self.needs_child or isinstance(pair.target, ChildTarget)) and (
            not self.needs_say or pair.target_has_a_say
        )


CHECKS: list[Check] = []


def _check(
    *, length: int = 8 * MIB, needs_child: bool = False, needs_say: bool = False
) -> Callable[[Callable[[Pair], None]], Callable[[Pair], None]]:
    def add(run: Callable[[Pair], None]) -> Callable[[Pair], None]:
        CHECKS.append(Check(run, length, needs_child, needs_say))
        return run

    return add


def runs_of(*rows: tuple[int, int, int]) -> Runs:
    """Runs from (local offset, remote offset, length)."""
    return Runs(*np.array(rows, np.uint64).reshape(-1, 3).T.copy())


def scattered(seed: int, op: Op, length: int, count: int) -> Runs:
    """`count` runs: disjoint destinations in random order, sources anywhere (they overlap)."""
    rng = np.random.default_rng(seed)
    edges = np.sort(rng.choice(length, 2 * count, replace=False))
    order = rng.permutation(count)
    destination, lengths = edges[::2][order], (edges[1::2] - edges[::2])[order]
    source = rng.integers(0, length - lengths + 1)
    local, remote = (destination, source) if op is Op.READ else (source, destination)
    return Runs(*(column.astype(np.uint64) for column in (local, remote, lengths)))


def expect(completion: Completion, *statuses: Status) -> None:
    """Fail unless the batch ended as it had to."""
    if completion.status not in statuses:
        raise AssertionError(
            f"ended {completion.status}, not {' or '.join(statuses)}: {completion}"
        )
    if (completion.status is Status.OK) == bool(completion.error):
        raise AssertionError(f"OK has no error, all else has one: {completion}")


def _moves_exactly(pair: Pair, op: Op, runs: Runs, *, here: bool = False) -> Completion:
    local, remote = pair.fill()
    if here:
        end = pair.transfer(op, pair.open(), runs)
    else:
        batch = pair.submit(op, pair.open(), runs)
        end = batch.wait(LIMIT_S)
    expect(end, Status.OK)
    into, source = (local, remote) if op is Op.READ else (remote, local)
    to, out_of = runs[:2] if op is Op.READ else runs[1::-1]
    for row in range(runs.lengths.size):
        first, start, size = int(to[row]), int(out_of[row]), int(runs.lengths[row])
        into[first : first + size] = source[start : start + size]
    if digest(pair.memory) != digest(local):
        raise AssertionError(f"local memory differs after {op} of {runs.lengths.size} runs")
    if pair.target.digest() != digest(remote):
        raise AssertionError(f"remote memory differs after {op} of {runs.lengths.size} runs")
    return end


@_check()
def scattered_runs_arrive_exactly(pair: Pair) -> None:
    """Both ways, more runs than one system call takes, overlapping sources, nothing else moved."""
    for op in Op:
        _moves_exactly(pair, op, scattered(3, op, pair.target.length, 3000))


@_check(length=MIB)
def what_the_calling_thread_moves_arrives_exactly(pair: Pair) -> None:
    """From one run to more than one slice, again and again on the lanes that others opened."""
    for op in Op:
        for count in (1, 2, 16, 17, 100, 1024, 3000):
            _moves_exactly(pair, op, scattered(count, op, pair.target.length, count), here=True)


@_check(length=MIB)
def single_bytes_arrive_exactly(pair: Pair) -> None:
    """Every other byte of a few KiB, in reverse."""
    offsets = np.arange(0, 8192, 2, dtype=np.uint64)
    for op in Op:
        _moves_exactly(pair, op, Runs(offsets[::-1].copy(), offsets, np.ones_like(offsets)))


@_check(length=MIB)
def adjacent_runs_travel_as_one(pair: Pair) -> None:
    """Neighbours on both sides merge; neighbours on one side only do not."""
    for op in Op:
        end = _moves_exactly(pair, op, runs_of(*((i * 100, i * 100 + 7, 100) for i in range(64))))
        if end.runs != 1 or end.descriptors != 64:
            raise AssertionError(f"64 neighbours became {end.runs} runs: {end}")
        end = _moves_exactly(pair, op, runs_of((0, 500, 10), (10, 700, 10)))
        if end.runs != 2:
            raise AssertionError(f"neighbours on one side only became {end.runs} runs")


@_check(length=65 * MIB)
def a_64_mib_run_arrives_exactly(pair: Pair) -> None:
    """One run, many slices, odd offsets, both ways; memory beside it stays as it was."""
    size, segment = 64 * MIB, pair.open()
    pair.target.fill(1)
    expect(pair.submit(Op.READ, segment, runs_of((4097, 3, size))).wait(LIMIT_S), Status.OK)
    remote = pattern(1, pair.target.length).copy()
    if not np.array_equal(pair.memory[4097 : 4097 + size], remote[3 : 3 + size]):
        raise AssertionError("64 MiB were not read exactly")
    if pair.memory[:4097].any() or pair.memory[4097 + size :].any():
        raise AssertionError("a read wrote beside its destination")
    expect(pair.submit(Op.WRITE, segment, runs_of((4097, 70001, size))).wait(LIMIT_S), Status.OK)
    remote[70001 : 70001 + size] = pair.memory[4097 : 4097 + size]
    if pair.target.digest() != digest(remote):
        raise AssertionError("64 MiB were not written exactly")


@_check()
def concurrent_batches_do_not_mix(pair: Pair) -> None:
    """Reads submitted from several threads at once, each into its own part."""
    local, remote = pair.fill()
    segment = pair.open()
    threads, rounds = 4, 10
    part = pair.target.length // (threads * rounds)
    batches: list[Batch] = []

    def read(thread: int) -> None:
        for step in range(rounds):
            into = (thread * rounds + step) * part
            source = pair.target.length - into - part
            batches.append(pair.submit(Op.READ, segment, runs_of((into, source, part))))

    readers = [threading.Thread(target=read, args=(n,)) for n in range(threads)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    for batch in batches:
        expect(batch.wait(LIMIT_S), Status.OK)
    for into in range(0, threads * rounds * part, part):
        source = pair.target.length - into - part
        local[into : into + part] = remote[source : source + part]
    if digest(pair.memory) != digest(local):
        raise AssertionError("the bytes of concurrent batches were mixed up")


@_check(length=MIB)
def the_initiator_refuses_addresses_outside(pair: Pair) -> None:
    """Both sides of both operations, before anything is sent."""
    segment = pair.open()
    end = pair.target.length
    for op in Op:
        for runs in (runs_of((end - 1, 0, 2)), runs_of((0, end - 1, 2)), runs_of((end, 0, 1))):
            try:
                batch = pair.submit(op, segment, runs)
            except OutOfBounds:
                continue
            raise AssertionError(f"{op} of {runs} was accepted: {batch.wait(LIMIT_S)}")


@_check(length=MIB)
def memory_that_is_not_there_fails_its_batch_only(pair: Pair) -> None:
    """The initiator believes a wrong record; the target or the kernel says no."""
    absent = RegionRecord(4096, 4096, "cpu")  # below mmap_min_addr: never mapped
    record = pair.target.record
    pair.target.record = msgspec.structs.replace(record, regions=(*record.regions, absent))
    segment = pair.open()
    for op in Op:
        batch = pair.initiator.submit(op, segment, [(pair.address, absent.address, 64)])
        expect(batch.wait(LIMIT_S), Status.REFUSED, Status.FAILED)
    _moves_exactly(pair, Op.READ, runs_of((0, 0, 1000)))


@_check()
def a_cancelled_batch_touches_nothing_any_more(pair: Pair) -> None:
    """Cancelled in the middle; afterwards the local pages may belong to somebody else."""
    pair.faults.slice_bytes = 64 << 10
    pair.faults.hold(after=2)
    segment = pair.open()
    pair.fill()
    batch = pair.submit(Op.READ, segment, runs_of((0, 0, pair.target.length)))
    pair.faults.wait_held()
    began = time.monotonic()
    batch.cancel()
    batch.cancel()
    expect(batch.wait(LIMIT_S), Status.CANCELLED)
    if time.monotonic() - began > PROMPT_S:
        raise AssertionError(f"cancelling took {time.monotonic() - began:.1f} s")
    pair.memory[:] = 7
    pair.faults.release()
    head = runs_of((0, 0, 100))
    expect(pair.submit(Op.READ, segment, head).wait(LIMIT_S), Status.OK)
    if not (pair.memory[100:] == 7).all():
        raise AssertionError("a cancelled batch wrote after its completion")


@_check(needs_child=True)
def a_batch_can_be_cancelled_while_the_target_does_nothing(pair: Pair) -> None:
    """A stopped process keeps its sockets open, so only the interrupt ends the wait."""
    assert isinstance(pair.target, ChildTarget)
    segment = pair.open()
    expect(pair.submit(Op.READ, segment, runs_of((0, 0, 1))).wait(LIMIT_S), Status.OK)
    pair.target.stop()
    for op in Op:
        batch = pair.submit(op, segment, runs_of((0, 0, pair.target.length)))
        batch.cancel()
        expect(batch.wait(PROMPT_S), Status.CANCELLED, Status.OK)  # OK: it needed no help
    pair.target.resume()
    expect(pair.submit(Op.READ, segment, runs_of((0, 0, 1))).wait(LIMIT_S), Status.OK)


@_check(needs_child=True)
def a_batch_ends_at_its_deadline_while_the_target_does_nothing(pair: Pair) -> None:
    """TIMED_OUT, or OK where the target need not do anything."""
    assert isinstance(pair.target, ChildTarget)
    segment = pair.open()
    expect(pair.submit(Op.READ, segment, runs_of((0, 0, 1))).wait(LIMIT_S), Status.OK)
    pair.target.stop()
    row = (pair.address, pair.target.address, pair.target.length)
    batch = pair.initiator.submit(Op.READ, segment, [row], timeout=0.3)
    expect(batch.wait(0.3 + PROMPT_S), Status.TIMED_OUT, Status.OK)
    pair.target.resume()


@_check(needs_child=True)
def a_killed_target_ends_batches_and_a_later_one_fails_too(pair: Pair) -> None:
    """SIGKILL in the middle of a batch."""
    assert isinstance(pair.target, ChildTarget)
    pair.faults.slice_bytes = 64 << 10
    pair.faults.hold(after=3)
    segment = pair.open()
    whole = runs_of((0, 0, pair.target.length))
    batch = pair.submit(Op.READ, segment, whole)
    pair.faults.wait_held()
    pair.target.kill()
    pair.faults.release()
    expect(batch.wait(LIMIT_S), Status.PEER_GONE)
    for op in Op:
        expect(pair.submit(op, segment, whole).wait(LIMIT_S), Status.PEER_GONE)


@_check()
def closing_the_initiator_ends_its_batches(pair: Pair) -> None:
    """Some moving, some waiting; each ends once and close comes back."""
    pair.faults.slice_bytes = 64 << 10
    pair.faults.hold(after=3)
    segment = pair.open()
    ends: list[Completion] = []
    for _ in range(5):
        batch = pair.submit(Op.READ, segment, runs_of((0, 0, pair.target.length)))
        batch.add_done_callback(ends.append)
    pair.faults.wait_held()
    began = time.monotonic()
    pair.initiator.close()
    if time.monotonic() - began > PROMPT_S:
        raise AssertionError(f"close took {time.monotonic() - began:.1f} s")
    if len(ends) != 5:
        raise AssertionError(f"5 batches gave {len(ends)} completions")
    for end in ends:
        expect(end, Status.CANCELLED)


@_check()
def closing_the_target_ends_the_initiators_batches(pair: Pair) -> None:
    """An orderly end of the other side, in the middle of a batch."""
    pair.faults.slice_bytes = 64 << 10
    pair.faults.hold(after=3)
    segment = pair.open()
    batch = pair.submit(Op.READ, segment, runs_of((0, 0, pair.target.length)))
    pair.faults.wait_held()
    pair.target.close()
    pair.faults.release()
    expect(batch.wait(LIMIT_S), Status.PEER_GONE)


@_check(length=MIB, needs_say=True)
def a_grant_that_was_never_given_is_refused(pair: Pair) -> None:
    """And the lane goes on serving what is permitted."""
    segment = pair.open()
    some = runs_of((0, 0, 1000))
    pair.target.grant(b"given")
    for op in Op:
        expect(pair.submit(op, segment, some, b"never").wait(LIMIT_S), Status.REFUSED)
        expect(pair.submit(op, segment, some, b"given").wait(LIMIT_S), Status.OK)


@_check(needs_say=True)
def a_revoked_grant_stops_serving(pair: Pair) -> None:
    """Revoked in the middle of a batch: no later slice is served, other grants live on."""
    pair.faults.slice_bytes = 64 << 10
    pair.faults.hold(after=3)
    segment = pair.open()
    pair.target.grant(b"ends")
    pair.target.grant(b"stays")
    whole = runs_of((0, 0, pair.target.length))
    batch = pair.submit(Op.READ, segment, whole, b"ends")
    pair.faults.wait_held()
    pair.target.revoke(b"ends")
    pair.faults.release()
    expect(batch.wait(LIMIT_S), Status.REFUSED, Status.PEER_GONE)
    expect(pair.submit(Op.READ, segment, whole, b"stays").wait(LIMIT_S), Status.OK)
