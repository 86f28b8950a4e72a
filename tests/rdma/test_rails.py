"""Transfers over two rails: shared by both, over one when the other is gone, over tcp without.

One target in a child process serves all of these tests, so each also shows that it went on after
the faults of those before. Bytes are counted where they leave, on the rails' interfaces.
"""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import rails
from mooncake_engine import Status, TransferEngine
from mooncake_engine.testing import conformance
from mooncake_engine.testing.conformance import LIMIT_S, MIB, Pair, runs_of
from mooncake_engine.testing.target import ChildTarget, digest
from mooncake_engine.types import Op
from msgspec.structs import replace
from rdma_stage import OURS, THEIRS, config

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mooncake_engine.batch import Batch
    from mooncake_engine.segment import Segment
    from mooncake_engine.types import Completion
    from rails import Rail

    BothRails = tuple[Rail, Rail]

LENGTH = 12 * MIB
#: A lost packet is sent again after 134 ms, and so often: what the slowest emulated machine still
#: answers, and what a test can wait for.
IMPATIENT = {"send_timeout": 15, "send_retry_count": 2}
PAUSE_S = 2.0
FOR_EVER_S = 600.0
WHOLE = runs_of((0, 0, LENGTH))
#: Of the bytes of a transfer: what the control connections and the kernel say besides.
NOISE = 64 << 10


@pytest.fixture(scope="module")
def target() -> Iterator[ChildTarget]:
    """Reached by both rails and by tcp."""
    with ChildTarget(config(*THEIRS, strict=False, **IMPATIENT), LENGTH) as child:
        yield child


@contextlib.contextmanager
def initiator(
    target: ChildTarget, *ours: str, strict: bool = True, **rdma: float
) -> Iterator[tuple[Pair, Segment]]:
    settings = config(*(ours or OURS), strict=strict, **{**IMPATIENT, **rdma})
    with TransferEngine(settings) as engine:
        pair = Pair(engine, target, target_has_a_say=False)
        # As if it were on another machine: nothing but tcp can stand in.
        yield pair, engine.open_segment(replace(target.record, machine_id="another"))


def move(pair: Pair, segment: Segment, nbytes: int, op: Op = Op.WRITE) -> Completion:
    return pair.submit(op, segment, runs_of((0, 0, nbytes))).wait(LIMIT_S)


def port_state(device: str) -> str:
    """ACTIVE or DOWN, as the driver says."""
    return (rails.SYSFS / device / "ports/1/state").read_text().split()[1]


class Stream:
    """Moves all of the memory again and again, two batches at a time, so that some are under way.

    A rail is lowered by a process, which takes from a tenth of a second to several.
    """

    def __init__(self, pair: Pair, segment: Segment, op: Op) -> None:
        self._what = (pair, op, segment)
        self._lock = threading.Lock()  # guards both below
        self._batches: list[Batch] = []
        self._open = True
        for _ in range(2):
            self._submit()

    def _submit(self) -> None:
        pair, op, segment = self._what
        with self._lock:
            if not self._open:
                return
            batch = pair.submit(op, segment, WHOLE)
            self._batches.append(batch)
        batch.add_done_callback(lambda _end: self._submit())

    def end(self) -> list[Completion]:
        """See two more batches end, then all; none failed."""
        with self._lock:
            count = len(self._batches) + 2
        until("batches go on", lambda: len(self._batches) >= count)
        with self._lock:
            self._open = False
        ends = [batch.wait(LIMIT_S) for batch in self._batches]
        for end in ends:
            conformance.expect(end, Status.OK)
        return ends


def until(what: str, condition: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"not within {limit_s:g} s: {what}"
        time.sleep(0.005)


class Traffic:
    """Bytes that left our end of each rail, or came in there, since this was made."""

    def __init__(self, both: BothRails, count: Callable[[str], int] = rails.bytes_sent) -> None:
        self._ours = [rail.devices[0] for rail in both]
        self._count = count
        self._before = self._now()

    def _now(self) -> list[int]:
        return [self._count(device) for device in self._ours]

    @property
    def by_rail(self) -> tuple[int, int]:
        first, second = (now - then for now, then in zip(self._now(), self._before, strict=True))
        return first, second


def test_a_transfer_is_shared_by_both_rails_either_way(
    both_rails: BothRails, target: ChildTarget
) -> None:
    with initiator(target) as (pair, segment):
        local, _ = pair.fill()
        for op, count in ((Op.WRITE, rails.bytes_sent), (Op.READ, rails.bytes_received)):
            traffic = Traffic(both_rails, count)
            conformance.expect(move(pair, segment, 4 * MIB, op), Status.OK)
            assert min(traffic.by_rail) > 1.9 * MIB, op
        assert digest(pair.memory) == digest(local)  # written, and read back


@pytest.mark.parametrize("dealt", [False, True], ids=["contiguous shares", "dealt in turn"])
def test_requests_go_to_rails_in_contiguous_shares_or_in_turn(
    both_rails: BothRails, target: ChildTarget, *, dealt: bool
) -> None:
    large, small, each = 60 << 10, 1 << 10, 16
    starts = [index * (64 << 10) for index in range(2 * each)]
    lengths = [large] * each + [small] * each
    runs = runs_of(*((start, start, length) for start, length in zip(starts, lengths, strict=True)))
    assert sum(lengths) <= MIB  # so that it is one slice of the engine's
    with initiator(target, path_round_robin=dealt) as (pair, segment):
        conformance.expect(move(pair, segment, MIB), Status.OK)  # both rails are connected
        traffic = Traffic(both_rails)
        conformance.expect(pair.submit(Op.WRITE, segment, runs).wait(LIMIT_S), Status.OK)
        less, more = sorted(traffic.by_rail)
    if dealt:
        assert less > 0.4 * sum(lengths)
    else:
        assert less < each * small + NOISE
        assert more > each * large


def test_a_rail_that_goes_down_in_mid_transfer_leaves_all_to_the_other_and_comes_back(
    both_rails: BothRails, target: ChildTarget
) -> None:
    first, _ = both_rails
    with initiator(target, rail_pause_s=PAUSE_S) as (pair, segment):
        pair.fill()
        traffic = Traffic(both_rails)
        stream = Stream(pair, segment, Op.WRITE)
        until("both rails carry", lambda: min(traffic.by_rail) > MIB // 4)
        with rails.lowered(first):
            before = traffic.by_rail
            ends = stream.end()
            assert {end.path.scheme for end in ends} == {"rdma"}
            assert target.digest() == digest(pair.memory)
            by_first, by_second = traffic.by_rail
            assert by_first - before[0] < NOISE
            assert by_second - before[1] > LENGTH
            assert by_first + by_second > len(ends) * LENGTH
        traffic = Traffic(both_rails)

        def carries_again() -> bool:
            conformance.expect(move(pair, segment, MIB), Status.OK)
            return traffic.by_rail[0] > 0.4 * MIB

        until("the rail that was lifted carries again", carries_again)


def test_reads_go_on_over_the_other_rail_too(both_rails: BothRails, target: ChildTarget) -> None:
    first, _ = both_rails
    with initiator(target, rail_pause_s=FOR_EVER_S) as (pair, segment):
        pair.fill()
        traffic = Traffic(both_rails, rails.bytes_received)
        stream = Stream(pair, segment, Op.READ)
        until("both rails carry", lambda: min(traffic.by_rail) > MIB // 4)
        with rails.lowered(first):
            stream.end()
            assert digest(pair.memory) == target.digest()
        traffic = Traffic(both_rails, rails.bytes_received)
        conformance.expect(move(pair, segment, MIB, Op.READ), Status.OK)
        by_first, by_second = traffic.by_rail
        assert by_first < NOISE  # it is up again, and rests
        assert by_second > MIB


def test_with_both_rails_down_a_batch_ends_over_tcp_and_later_ones_go_over_rdma_again(
    both_rails: BothRails, target: ChildTarget
) -> None:
    with initiator(target, strict=False, rail_pause_s=PAUSE_S) as (pair, segment):
        pair.fill()
        traffic = Traffic(both_rails)
        stream = Stream(pair, segment, Op.WRITE)
        until("both rails carry", lambda: min(traffic.by_rail) > MIB // 4)
        with rails.lowered(*both_rails):
            end = stream.end()[-1]
            assert end.path.scheme == "tcp"
            assert_names_both(end.path.reason)
            assert target.digest() == digest(pair.memory)
            after = move(pair, segment, MIB, Op.READ)  # both rest: nothing is waited for
            conformance.expect(after, Status.OK)
            assert after.path.scheme == "tcp"
            assert_names_both(after.path.reason)

        def over_rdma() -> bool:
            end = move(pair, segment, MIB)
            conformance.expect(end, Status.OK)
            return end.path.scheme == "rdma"

        until("transfers go over rdma again", over_rdma)


def test_with_both_rails_down_and_no_other_path_permitted_a_batch_fails_and_names_them(
    both_rails: BothRails, target: ChildTarget
) -> None:
    with initiator(target, strict=True, rail_pause_s=PAUSE_S) as (pair, segment):
        conformance.expect(move(pair, segment, MIB), Status.OK)
        with rails.lowered(*both_rails):
            for _ in range(2):  # rails that fail, and rails that rest
                end = move(pair, segment, MIB)
                conformance.expect(end, Status.PEER_GONE)
                assert_names_both(end.error)
                assert "strict_transport" in end.error

        until("it works again", lambda: move(pair, segment, MIB).status is Status.OK)


def assert_names_both(text: str) -> None:
    for ours, theirs in zip(OURS, THEIRS, strict=True):
        assert f"{ours} -> {theirs}" in text


def test_a_port_that_is_active_may_carry_nothing_and_the_other_rail_does(
    both_rails: BothRails, target: ChildTarget
) -> None:
    """What a switch that lost a route does: packets leave, no error is seen, none arrives."""
    first, _ = both_rails
    with initiator(target, rail_pause_s=FOR_EVER_S) as (pair, segment):
        pair.fill()
        conformance.expect(move(pair, segment, MIB), Status.OK)
        traffic = Traffic(both_rails)
        with misled(first):
            arrived = rails.counters(first.devices[1])["rcvd_pkts"]
            conformance.expect(move(pair, segment, 2 * MIB), Status.OK)
            states = {port_state(device) for device in first.devices}
            assert rails.counters(first.devices[1])["rcvd_pkts"] == arrived
        assert states == {"ACTIVE"}
        by_first, by_second = traffic.by_rail
        assert by_first > NOISE
        assert by_second > 2 * MIB
        conformance.expect(move(pair, segment, LENGTH), Status.OK)
        assert target.digest() == digest(pair.memory)


@contextlib.contextmanager
def misled(rail: Rail) -> Iterator[None]:
    """What the first end sends goes to an address that nobody has."""
    here, there = (rails.interface(device) for device in rail.devices)

    def neighbour(address: str) -> None:
        what = ["neigh", "replace", rail.addresses[1], "lladdr", address, "dev", here]
        subprocess.run(["ip", *what], check=True)

    right = Path(f"/sys/class/net/{there}/address").read_text().strip()
    neighbour("02:00:00:00:00:99")
    try:
        yield
    finally:
        neighbour(right)
