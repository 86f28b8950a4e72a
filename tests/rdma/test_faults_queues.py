"""Queues and registrations at their limits, and what engines leave behind."""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest
import rails
from control_proxy import ControlProxy
from mooncake_engine import PathUnavailable, Status
from mooncake_engine.testing.conformance import scattered
from mooncake_engine.testing.target import pattern
from mooncake_engine.transport.rdma.messages import Connect, Message, QueueAddress
from mooncake_engine.types import Op
from rdma_ends import CONNECT_S, LENGTH, LIMIT_S, MIB, End, Pair, until
from rdma_stage import OURS, THEIRS
from rdma_watch import kernel_counts

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.mark.usefixtures("pair")
def test_completion_queues_never_overflow_however_much_is_submitted() -> None:
    """Batches of 16 times the depth of a queue pair, both ways, over two links at once."""
    small: dict[str, Any] = {"max_wr": 16, "max_cqe": 32, "slice_bytes": 4096, "num_qp": 2}
    part, count = MIB, 256
    with (
        End(THEIRS[:1], **small) as first,
        End(THEIRS[:1], **small) as second,
        End(OURS[:1], **small) as ours,
        ours.open(first.record) as to_first,
        ours.open(second.record) as to_second,
    ):
        ours.memory[:] = pattern(1, LENGTH)
        expected = [ours.memory.copy()]
        batches = []
        for number, (end, segment) in enumerate(((first, to_first), (second, to_second))):
            end.memory[:] = pattern(6 + number, LENGTH)
            there = end.memory.copy()
            for op in Op:
                runs = np.stack(scattered(7 + number, op, part, count), 1)
                runs[:, 0] += np.uint64((2 * number + (op is Op.WRITE)) * part)
                # Away from what is read, which then does not depend on what came first.
                runs[:, 1] += np.uint64((op is Op.WRITE) * part)
                batches.append(ours.submit(op, segment, *runs.tolist()))
                for here, far, size in runs.tolist():
                    if op is Op.READ:
                        expected[0][here : here + size] = there[far : far + size]
                    else:
                        there[far : far + size] = expected[0][here : here + size]
            expected.append(there)
        for batch in batches:
            end_of = batch.wait(30)
            assert end_of.ok, end_of.error
        for side, wanted in zip((ours, first, second), expected, strict=True):
            assert np.array_equal(side.memory, wanted)


@pytest.mark.parametrize("shift", [1000, -1000], ids=["seen as repeated", "seen as lost"])
def test_queue_pairs_whose_packet_numbers_do_not_fit_are_never_used(pair: Pair, shift: int) -> None:
    """The target expects other numbers: what looks repeated is acknowledged and moves nothing."""

    def shifted(message: Message) -> Message:
        if not isinstance(message, Connect):
            return message
        queues = [QueueAddress(q.number, (q.psn + shift) % (1 << 24)) for q in message.queues]
        return msgspec.structs.replace(message, queues=tuple(queues))

    with ControlProxy(pair.theirs.record) as proxy:
        proxy.to_target = shifted
        with pair.ours.open(proxy.record) as segment:
            began = time.monotonic()
            end = pair.ours.submit(Op.WRITE, segment, (0, 0, MIB)).wait(CONNECT_S + LIMIT_S)
            assert end.status is Status.PEER_GONE, end
            assert f"{OURS[0]} -> {THEIRS[0]}" in end.error
            assert time.monotonic() - began < CONNECT_S + LIMIT_S
            pair.check_untouched(pair.ours, pair.theirs)


def test_a_target_makes_no_more_queue_pairs_than_it_can_hear_of(pair: Pair) -> None:
    """Each is proven by a message; its completion queue has room for four."""
    with (
        End(THEIRS[:1], max_cqe=4) as theirs,
        End(OURS[:1], num_qp=8) as ours,
        ours.open(theirs.record) as segment,
    ):
        end = ours.move(Op.READ, segment, (0, 0, 1))
        assert end.status is Status.PEER_GONE
        assert "finding a place in a completion queue" in end.error
    with (
        End(THEIRS[:1], max_cqe=4) as theirs,
        pair.ours.open(theirs.record) as segment,
    ):
        for _ in range(5):  # a place is free again when its message has come
            with End(OURS[:1], num_qp=4) as ours, ours.open(theirs.record) as other:
                assert ours.move(Op.READ, other, (0, 0, 1)).ok
        assert pair.ours.move(Op.READ, segment, (0, 0, 1)).ok


@contextlib.contextmanager
def few_objects(device: str, tmp_path: Path, count: int) -> Iterator[None]:
    """This process may make so many objects of a device: the kernel refuses the next."""
    if not rails.in_guest():
        pytest.skip("control groups are made in the guest only, never on a machine of somebody's")
    root = tmp_path / "groups"
    root.mkdir()
    with contextlib.ExitStack() as undo:
        subprocess.run(["mount", "-t", "cgroup2", "none", str(root)], check=True)
        undo.callback(subprocess.run, ["umount", str(root)], check=True)
        (root / "cgroup.subtree_control").write_text("+rdma")
        group = root / "few"
        group.mkdir()
        undo.callback(group.rmdir)
        (group / "rdma.max").write_text(f"{device} hca_object={count}")
        (group / "cgroup.procs").write_text("0")
        undo.callback((root / "cgroup.procs").write_text, "0")
        yield


def test_a_nic_that_is_out_of_registrations_refuses_memory_and_serves_on(
    pair: Pair, tmp_path: Path
) -> None:
    more = np.zeros(MIB, np.uint8)
    with End(OURS[:1], length=64 << 10, max_mr_bytes=64 << 10) as ours:
        before = kernel_counts(OURS[0])
        with few_objects(OURS[0], tmp_path, 9):
            with pytest.raises(PathUnavailable, match=OURS[0]):
                ours.engine.register_memory(more)  # 16 of them
            assert kernel_counts(OURS[0]) == before
            some = ours.engine.register_memory(more[: MIB // 2])  # 8 of them
            with ours.open(pair.theirs.record) as segment:
                there = segment.record.regions[0].address
                batch = ours.engine.submit(Op.READ, segment, [(some.address, there, MIB // 2)])
                assert batch.wait(LIMIT_S).status is Status.PEER_GONE  # no queue pair is left
            ours.engine.unregister_memory(some)
        ours.engine.register_memory(more)
        with ours.open(pair.theirs.record) as segment:
            batch = ours.engine.submit(Op.READ, segment, [(int(more.ctypes.data), there, MIB)])
            end = batch.wait(LIMIT_S)
            assert end.ok, end.error
        assert np.array_equal(more, pair.theirs.memory[:MIB])


def test_engines_and_connections_leave_nothing_behind(pair: Pair) -> None:
    def left() -> tuple[int, list[str], list[dict[str, int]]]:
        threads = sorted(thread.name.rpartition("-")[0] for thread in threading.enumerate())
        return len(list(Path("/proc/self/fd").iterdir())), threads, pair.counts()

    def round_trip() -> None:
        with End(OURS[:1], length=64 << 10) as ours:
            for _ in range(2):
                with ours.open(pair.theirs.record) as segment:
                    assert ours.move(Op.READ, segment, (0, 0, 64 << 10)).ok

    until("the target noticed the end of what was before", lambda: pair.counts() == pair.at_rest)
    before = left()
    for _ in range(20):
        round_trip()
    until("the target noticed", lambda: left() == before)
