"""Whole transfers over stub NICs whose requests end, and fail, in an order of the seed's choosing.

The look that a waiting lane takes every second would hide a lost wake-up: here it takes an hour.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from mooncake_engine import Status, TransferEngine
from mooncake_engine.testing.conformance import scattered
from mooncake_engine.testing.target import pattern
from mooncake_engine.transport.rdma import moving, transport
from mooncake_engine.transport.rdma.verbs.base import VerbsError
from mooncake_engine.types import Op
from rdma_stage import config
from verbs_fabric import NAMES, Fabric
from verbs_stub import StubCompletionQueue

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mooncake_engine.batch import Batch
    from mooncake_engine.segment import Segment
    from numpy.typing import NDArray

LENGTH = 1 << 20
PART = LENGTH // 8
LIMIT_S = 30.0
TIGHT: dict[str, Any] = {
    "num_qp": 3,
    "max_wr": 6,
    "max_cqe": 16,
    "max_sge": 2,
    "max_chain": 8,
    "slice_bytes": 4096,
}
#: A rail that fails goes on being used.
HARDY: dict[str, Any] = {"rail_error_threshold": 1000, "retry_count": 127}


class Stage:
    """Two engines on joined NICs, and the memory of each."""

    def __init__(self, fabric: Fabric, ours: TransferEngine, theirs: TransferEngine) -> None:
        self.fabric = fabric
        self.engine, self.target = ours, theirs
        self.near, self.far = (engine.allocate(LENGTH) for engine in (ours, theirs))
        self.near[:], self.far[:] = pattern(1, LENGTH), pattern(2, LENGTH)
        self.segment: Segment = ours.open_segment(theirs.record())

    def submit(self, op: Op, runs: NDArray[np.uint64]) -> Batch:
        """Runs as rows of offset here, offset there, length."""
        start = np.array([address_of(self.near), address_of(self.far), 0], np.uint64)
        return self.engine.submit(op, self.segment, *(runs + start).T)


def address_of(memory: NDArray[np.uint8]) -> int:
    return int(memory.ctypes.data)


@contextlib.contextmanager
def staged(
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
    *,
    fail_every: int = 0,
    together: bool = False,
    **rdma: Any,  # noqa: ANN401 - settings are of any type
) -> Iterator[Stage]:
    monkeypatch.setattr(moving, "_LOOK_S", 3600.0)
    with Fabric(seed, fail_every=fail_every, together=together) as fabric:
        monkeypatch.setattr(transport, "load", lambda _binding: fabric.verbs)
        with (
            TransferEngine(config(NAMES[1], **rdma)) as theirs,
            TransferEngine(config(NAMES[0], **rdma)) as ours,
        ):
            yield Stage(fabric, ours, theirs)
    assert fabric.provider.open == 0


def scattered_parts(stage: Stage, seed: int) -> tuple[list[Batch], list[NDArray[np.uint8]]]:
    """READs and WRITEs into parts of their own; also what memory must hold afterwards."""
    near, far = stage.near.copy(), stage.far.copy()
    batches = []
    for number, op in enumerate(itertools.islice(itertools.cycle(Op), 4)):
        runs = np.stack(scattered(seed + number, op, PART, 200), 1)
        into, source = np.uint64((4 + number) * PART), np.uint64(number * PART)
        runs[:, :2] += np.array([into, source] if op is Op.READ else [source, into], np.uint64)
        batches.append(stage.submit(op, runs))
        for here, there, size in runs.tolist():
            if op is Op.READ:
                near[here : here + size] = stage.far[there : there + size]
            else:
                far[there : there + size] = stage.near[here : here + size]
    return batches, [near, far]


@pytest.mark.parametrize("poll_us", [0.0, 50.0, 50_000.0], ids=["sleeps", "both", "polls"])
@pytest.mark.parametrize("seed", range(4))
def test_everything_arrives_in_whatever_order_requests_end(
    monkeypatch: pytest.MonkeyPatch, seed: int, poll_us: float
) -> None:
    with staged(monkeypatch, seed, poll_us=poll_us, **TIGHT) as stage:
        batches, wanted = scattered_parts(stage, seed)
        for batch in batches:
            end = batch.wait(LIMIT_S)
            assert end.ok, end.error
        assert np.array_equal(stage.near, wanted[0])
        assert np.array_equal(stage.far, wanted[1])


@pytest.mark.parametrize("seed", range(6))
def test_everything_arrives_though_queue_pairs_fail_all_the_time(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    with staged(monkeypatch, seed, fail_every=15, **TIGHT, **HARDY) as stage:
        batches, wanted = scattered_parts(stage, seed)
        for batch in batches:
            end = batch.wait(LIMIT_S)
            assert end.ok, end.error
        assert stage.fabric.failed
        assert np.array_equal(stage.near, wanted[0])
        assert np.array_equal(stage.far, wanted[1])


@pytest.mark.parametrize("seed", range(6))
def test_memory_is_let_go_of_when_a_batch_was_cancelled_among_others(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    with staged(monkeypatch, seed, fail_every=200, **TIGHT, **HARDY) as stage:
        half = np.array([[0, 0, LENGTH // 2]], np.uint64)
        rest = half + np.array([[LENGTH // 2, LENGTH // 2, 0]], np.uint64)
        for _ in range(5):
            given_up, stays = stage.submit(Op.READ, half), stage.submit(Op.READ, rest)
            ended = stage.fabric.provider.of("post")
            given_up.cancel()
            status = given_up.wait(LIMIT_S).status
            assert status in {Status.CANCELLED, Status.OK}, len(ended)
            stage.near[: LENGTH // 2] = 7
            end = stays.wait(LIMIT_S)
            assert end.ok, end.error
            assert (stage.near[: LENGTH // 2] == 7).all()
            assert np.array_equal(stage.near[LENGTH // 2 :], stage.far[LENGTH // 2 :])


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_memory_registered_anew_is_reached_though_all_queue_pairs_met_the_old_key(
    monkeypatch: pytest.MonkeyPatch, seed: int, *, together: bool
) -> None:
    whole = np.array([[0, 0, LENGTH]], np.uint64)
    with staged(monkeypatch, seed, together=together, **TIGHT) as stage:
        for _ in range(3):
            stage.near[:] = 0
            end = stage.submit(Op.READ, whole).wait(LIMIT_S)
            assert end.ok, end.error
            assert np.array_equal(stage.near, stage.far)
            stage.target.unregister_memory(address_of(stage.far))
            stage.target.register_memory(stage.far)


@pytest.mark.parametrize("op", Op)
def test_memory_taken_back_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, op: Op) -> None:
    whole = np.array([[0, 0, LENGTH]], np.uint64)
    with staged(monkeypatch, 1, **TIGHT) as stage:
        assert stage.submit(Op.READ, whole).wait(LIMIT_S).ok
        stage.target.unregister_memory(address_of(stage.far))
        stage.far[:] = 9
        stage.near[:] = 7
        for _ in range(2):  # once the NIC says no, once the keys do
            end = stage.submit(op, whole).wait(LIMIT_S)
            assert end.status is Status.REFUSED
            assert "unregistered" in end.error
        assert (stage.near == 7).all()
        assert (stage.far == 9).all()


def test_a_nic_that_fails_altogether_ends_the_batch_and_touches_nothing_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = np.array([[0, 0, LENGTH]], np.uint64)
    with staged(monkeypatch, 1, poll_us=0.0, **TIGHT) as stage:
        assert stage.submit(Op.READ, whole).wait(LIMIT_S).ok
        stage.near[:] = 0
        failing = threading.Event()
        _fail_to_arm(monkeypatch, failing)
        failing.set()
        stage.fabric.hold()
        end = stage.submit(Op.READ, whole).wait(LIMIT_S)
        assert end.status is Status.FAILED
        assert "EIO" in end.error or "Input/output" in end.error
        stage.near[:] = 7
        failing.clear()
        stage.fabric.release()
        head = np.array([[0, 0, 100]], np.uint64)
        _soon(lambda: stage.submit(Op.READ, head).wait(LIMIT_S).ok)
        assert (stage.near[100:] == 7).all()


def _fail_to_arm(monkeypatch: pytest.MonkeyPatch, failing: threading.Event) -> None:
    arm = StubCompletionQueue.arm

    def arm_or_fail(queue: StubCompletionQueue) -> None:
        if failing.is_set() and threading.current_thread().name.startswith("mooncake"):
            raise VerbsError(errno.EIO, "arming a completion queue")
        arm(queue)

    monkeypatch.setattr(StubCompletionQueue, "arm", arm_or_fail)


def _soon(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end
