"""The way is lost, the peer is not: slices go on over the next path, here from shm to tcp."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest
from engines import SOON, address, config
from mooncake_engine import (
    Op,
    Path,
    PathUnavailable,
    RegionRecord,
    ShmConfig,
    Status,
    TcpConfig,
    TransferEngine,
)
from mooncake_engine.testing.faults import Faults, FaultyTransport, install
from mooncake_engine.transport.base import Capabilities
from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mooncake_engine import Batch, SegmentRecord
    from mooncake_engine.transport.base import Link

PIECE = 64 << 10
LENGTH = 16 * PIECE
LOST = "every rail to the peer failed"


class Gated(FaultyTransport):
    """A transport whose `connect` waits at a gate, and fails as often as told."""

    failures = 0

    def __init__(self, *args: Any) -> None:  # noqa: ANN401 - FaultyTransport's
        super().__init__(*args)
        self.gate = threading.Event()
        self.entered = threading.Semaphore(0)
        self.connects = 0

    @override
    def connect(self, peer: SegmentRecord) -> Link:
        self.connects += 1
        self.entered.release()
        assert self.gate.wait(SOON)
        if self.failures:
            self.failures -= 1
            raise PathUnavailable("the cable is out")
        return super().connect(peer)


class Two:
    """`near` reaches `far` over shm through the faults `own`, and over tcp through `other`."""

    def __init__(self, near: TransferEngine, far: TransferEngine) -> None:
        self.near = near
        self.far = far
        self.memory, self.source = near.allocate(LENGTH), far.allocate(LENGTH)
        self.source[:] = np.random.default_rng(5).integers(0, 256, LENGTH, np.uint8)
        self.own, self.other = Faults(slice_bytes=PIECE), Faults(slice_bytes=PIECE)
        install(near, self.own, "shm")
        near.transports.pop("rdma", None)  # where there are NICs, it would be next
        if "tcp" in near.transports:
            install(near, self.other, "tcp")

    def gate(self) -> Gated:
        gated = Gated(self.near.transports["tcp"], Faults())
        self.near.transports["tcp"] = gated
        return gated

    def submit(self, op: str = "read", length: int = LENGTH, **how: Any) -> Batch:  # noqa: ANN401 - submit's keywords
        row = (address(self.memory), address(self.source), length)
        return self.near.submit(op, self.near.open_segment(self.far.name), [row], **how)

    def same(self) -> bool:
        return bool((self.memory == self.source).all())


@contextlib.contextmanager
def two_engines(**fields: Any) -> Iterator[Two]:  # noqa: ANN401 - whatever a field takes
    fields = {"strict_transport": False, **fields}
    with (
        TransferEngine(config("shm", strict_transport=False)) as far,
        TransferEngine(config(**{"protocol": "shm", **fields})) as near,
    ):
        two = Two(near, far)
        yield two
        two.own.release()
        two.other.release()


def test_a_path_lost_before_the_first_slice_is_replaced() -> None:
    with two_engines() as two:
        two.own.lose(LOST)
        end = two.submit().wait(SOON)
        assert (end.status, end.path) == (Status.OK, Path("tcp", f"shm: {LOST}"))
        assert two.same()
        assert (two.own.moves, two.other.moves) == (0, 16)
        assert {key.scheme for key in two.near.statistics()} == {"tcp"}
        assert two.near.open_segment(two.far.name).path.scheme == "shm"


def test_shared_memory_stands_in_for_sockets_too() -> None:
    with two_engines(protocol="tcp") as two:
        two.other.lose(LOST)
        end = two.submit().wait(SOON)
        assert (end.status, end.path.scheme) == (Status.OK, "shm")
        assert two.same()


@pytest.mark.parametrize("op", list(Op))
def test_a_path_lost_in_mid_batch_is_replaced_for_the_slices_that_are_left(op: Op) -> None:
    with two_engines() as two:
        two.own.hold(after=5)
        if op is Op.WRITE:
            two.memory[:], two.source[:] = two.source, 0
        batch = two.submit(op)
        two.own.wait_held()
        two.own.lose(LOST)
        two.own.release()
        end = batch.wait(SOON)
        assert (end.status, end.path.scheme) == (Status.OK, "tcp")
        assert two.same()
        assert two.source.any()
        assert (two.own.moves, two.other.moves) == (5, 11)


def test_a_path_that_is_back_is_used_again_and_the_detour_given_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with two_engines(shm=ShmConfig(threads=1)) as two:
        paths = []
        for step in range(3):
            two.own.lose(LOST)
            assert two.submit().wait(SOON).path.scheme == "tcp"
            assert two.submit().wait(SOON).path.scheme == "tcp"
            two.own.recover()
            paths.append(two.submit().wait(SOON).path)
            assert two.other.opened == step + 1  # one lane each time, closed when shm was back
        assert set(paths) == {two.near.open_segment(two.far.name).path}
        told = [record.message for record in caplog.records if record.name.endswith("failover")]
        assert (
            told
            == [
                f"transfers go on over tcp, since shm: {LOST}",
                "transfers go over shm again",
            ]
            * 3
        )


def test_an_engine_that_keeps_its_path_connects_no_other() -> None:
    with two_engines() as two:
        gated = two.gate()
        assert two.submit().wait(SOON).ok
        two.own.fail(Status.PEER_GONE, "it hung up")
        assert two.submit().wait(SOON).error == "it hung up"
        assert gated.connects == 0


def test_when_both_paths_are_lost_the_error_names_both() -> None:
    with two_engines() as two:
        two.own.lose(LOST)
        two.other.lose("no tcp either")
        end = two.submit().wait(SOON)
        assert end.status is Status.PEER_GONE
        assert LOST in end.error
        assert "no tcp either" in end.error
        two.other.recover()
        two.other.fail(Status.PEER_GONE, "reset by peer")
        end = two.submit().wait(SOON)
        assert end.status is Status.PEER_GONE
        assert end.error == f"reset by peer (over tcp, since shm: {LOST})"
        assert end.path.scheme == "tcp"
        assert two.submit().wait(SOON).ok
        two.own.recover()
        assert two.submit().wait(SOON).path.scheme == "shm"
        assert two.same()


def test_a_refusal_on_the_other_path_stays_a_refusal_and_keeps_the_lane() -> None:
    with two_engines(shm=ShmConfig(threads=1)) as two:
        two.own.lose(LOST)
        assert two.submit().wait(SOON).ok
        two.other.fail(Status.REFUSED, "the grant has ended")
        end = two.submit().wait(SOON)
        assert end.status is Status.REFUSED
        assert "the grant has ended" in end.error
        assert two.submit().wait(SOON).ok
        assert two.other.opened == 1


def test_a_strict_engine_ends_its_batches_and_says_why() -> None:
    with two_engines(strict_transport=True) as two:
        two.own.lose(LOST)
        end = two.submit().wait(SOON)
        assert end.status is Status.PEER_GONE
        assert end.error.startswith(f"shm: {LOST}; no other path is permitted (by strict_transport")
        assert end.path.scheme == "shm"
        two.own.recover()
        assert two.submit().wait(SOON).ok


def test_a_segment_that_was_asked_for_one_protocol_keeps_to_it() -> None:
    with two_engines() as two:
        two.own.lose(LOST)
        segment = two.near.open_segment(two.far.name, protocol="shm")
        row = (address(two.memory), address(two.source), LENGTH)
        end = two.near.submit("read", segment, [row]).wait(SOON)
        assert end.status is Status.PEER_GONE
        assert "no other path is permitted" in end.error
        assert two.other.opened == 0


def test_a_peer_that_offers_no_other_path_is_named_with_the_reason() -> None:
    with (
        TransferEngine(config("shm")) as far,
        TransferEngine(config("shm", strict_transport=False)) as near,
    ):
        two = Two(near, far)
        two.own.lose(LOST)
        end = two.submit().wait(SOON)
        assert end.status is Status.PEER_GONE
        assert f"shm: {LOST}; no path to {far.name}: " in end.error
        assert f"tcp: {far.name} does not offer it" in end.error


def test_a_path_that_cannot_reach_the_memory_does_not_stand_in() -> None:
    with two_engines() as two:
        segment = two.near.open_segment(two.far.name)
        device = RegionRecord(1 << 40, 4096, "cuda:1")
        regions = (*segment.record.regions, device)
        segment.update(msgspec.structs.replace(segment.record, regions=regions))
        two.own.lose(LOST)
        row = (address(two.memory), address(two.source), PIECE)
        end = two.near.submit("read", segment, [row]).wait(SOON)
        assert end.status is Status.PEER_GONE
        assert "tcp: it cannot reach memory on cuda:1" in end.error


def test_a_path_that_cannot_do_the_operation_does_not_stand_in() -> None:
    with two_engines() as two:
        two.near.transports["tcp"].capabilities = Capabilities(ops=frozenset({Op.WRITE}))  # type: ignore[misc]  # FaultyTransport's is of the instance
        two.own.lose(LOST)
        end = two.submit("read").wait(SOON)
        assert (end.status, end.error) == (
            Status.PEER_GONE,
            f"shm: {LOST}; and tcp cannot read",
        )
        assert two.submit("write").wait(SOON).path.scheme == "tcp"


def test_a_batch_can_be_cancelled_on_the_other_path() -> None:
    with two_engines() as two:
        two.own.lose(LOST)
        two.other.hold(after=3)
        batch = two.submit()
        two.other.wait_held()
        batch.cancel()
        end = batch.wait(SOON)
        assert (end.status, end.error) == (Status.CANCELLED, "cancelled by the caller")
        assert end.path.scheme == "tcp"
        two.memory[:] = 7
        two.other.release()
        assert two.submit(length=PIECE).wait(SOON).ok
        assert (two.memory[PIECE:] == 7).all()


def test_a_batch_on_the_other_path_ends_at_its_deadline() -> None:
    with two_engines() as two:
        two.own.lose(LOST)
        two.other.hold()
        batch = two.submit(timeout=2.0)
        two.other.wait_held()
        end = batch.wait(SOON)
        assert (end.status, end.path.scheme) == (Status.TIMED_OUT, "tcp")
        two.other.release()
        assert two.submit().wait(SOON).ok


@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_a_batch_does_not_wait_for_a_path_that_takes_long_to_connect(how: str) -> None:
    with two_engines() as two:
        gated = two.gate()
        two.own.lose(LOST)
        batch = two.submit(timeout=0.2 if how == "deadline" else SOON)
        assert gated.entered.acquire(timeout=SOON)
        if how == "cancel":
            batch.cancel()
        end = batch.wait(SOON / 2)
        assert end.status is (Status.CANCELLED if how == "cancel" else Status.TIMED_OUT)
        gated.gate.set()
        assert two.submit().wait(SOON).path.scheme == "tcp"
        assert two.same()
        assert gated.connects == 1  # what was left behind is used after all


def openers() -> int:
    return sum(thread.name == "mooncake detour of shm" for thread in threading.enumerate())


def test_lanes_share_one_connection() -> None:
    with two_engines() as two:
        gated = two.gate()
        two.own.lose(LOST)
        batches = [two.submit(length=PIECE), two.submit(length=PIECE)]
        end = time.monotonic() + SOON
        while openers() < 2:
            assert time.monotonic() < end, "two lanes wait for one connection"
            time.sleep(0.001)  # nothing tells when a thread has begun to wait
        gated.gate.set()
        assert all(batch.wait(SOON).ok for batch in batches)
        assert gated.connects == 1


def test_a_failed_attempt_to_connect_is_told_and_made_again() -> None:
    with two_engines() as two:
        gated = two.gate()
        gated.gate.set()
        gated.failures = 1
        two.own.lose(LOST)
        end = two.submit(length=PIECE).wait(SOON)
        assert end.status is Status.PEER_GONE
        assert end.error.endswith("tcp: the cable is out")
        assert two.submit(length=PIECE).wait(SOON).path.scheme == "tcp"


def test_closing_the_engine_does_not_let_a_batch_wait_for_a_path_that_connects() -> None:
    with two_engines() as two:
        gated = two.gate()
        two.own.lose(LOST)
        batch = two.submit()
        assert gated.entered.acquire(timeout=SOON)
        closing = threading.Thread(target=two.near.close)
        closing.start()
        assert batch.wait(SOON / 2).status is Status.CANCELLED
        closing.join(0.1)
        assert closing.is_alive()  # whoever opens, closes: it waits for what still connects
        gated.gate.set()
        closing.join(SOON)
        assert not closing.is_alive()


def test_slices_are_cut_finer_for_a_path_that_takes_smaller_ones() -> None:
    tcp = TcpConfig(min_port=0, max_port=0, slice_bytes=4096)
    with two_engines(tcp=tcp) as two:
        two.own.lose(LOST)
        end = two.submit().wait(SOON)
        assert (end.status, end.path.scheme) == (Status.OK, "tcp")
        assert two.same()
        assert two.other.moves == LENGTH // 4096


def test_batches_survive_a_path_that_comes_and_goes() -> None:
    """Seeded, with cancels in between; whatever ends OK has its bytes."""
    rng = random.Random(7)
    with two_engines() as two:
        schemes = set()
        for _ in range(150):
            two.memory[:] = 0
            two.own.hold(after=rng.randrange(20))
            batch = two.submit()
            if rng.random() < 0.5:
                two.own.lose(LOST)
            if rng.random() < 0.2:
                batch.cancel()
            two.own.release()
            end = batch.wait(SOON)
            assert end.status in {Status.OK, Status.CANCELLED}
            if end.ok:
                assert two.same()
                schemes.add(end.path.scheme)
            two.own.recover()
        assert schemes == {"shm", "tcp"}
