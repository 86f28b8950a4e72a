"""A NIC that neither ends requests nor says that they failed, as Soft-RoCE does without a route."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from mooncake_engine import Status, TransferEngine
from mooncake_engine.testing.target import pattern
from mooncake_engine.transport.rdma import moving, transport
from rdma_stage import config
from verbs_fabric import NAMES, Fabric

if TYPE_CHECKING:
    from mooncake_engine.batch import Batch
    from mooncake_engine.segment import Segment
    from numpy.typing import NDArray

LENGTH = 1 << 20
LIMIT_S = 30.0


def read(ours: TransferEngine, segment: Segment, near: NDArray[np.uint8], far: int) -> Batch:
    return ours.submit("read", segment, [(int(near.ctypes.data), far, LENGTH)])


@pytest.mark.parametrize("hardy", [True, False], ids=["used again", "given up"])
def test_queue_pairs_that_fall_silent_are_given_up_and_what_they_held_moves_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, *, hardy: bool
) -> None:
    monkeypatch.setattr(moving, "_SILENCE_S", 0.3)
    threshold = 1000 if hardy else 1
    with Fabric(1) as fabric:
        monkeypatch.setattr(transport, "load", lambda _binding: fabric.verbs)
        settings = {"send_timeout": 1, "rail_error_threshold": threshold}
        with (
            TransferEngine(config(NAMES[1], **settings)) as theirs,
            TransferEngine(config(NAMES[0], **settings)) as ours,
        ):
            near, far = ours.allocate(LENGTH), theirs.allocate(LENGTH)
            far[:] = pattern(2, LENGTH)
            segment = ours.open_segment(theirs.record())
            assert read(ours, segment, near, int(far.ctypes.data)).wait(LIMIT_S).ok
            near[:] = 0
            for pair in list(fabric._pairs.values()):
                fabric.remove(pair)
            end = read(ours, segment, near, int(far.ctypes.data)).wait(LIMIT_S)
            said = "stub0 -> stub1 moved nothing for 0.3 s"
            if hardy:
                assert end.ok, end.error
                assert np.array_equal(near, far)
                assert said in caplog.text
            else:
                assert end.status is Status.PEER_GONE
                assert said in end.error


def test_a_cancelled_batch_ends_though_its_queue_pairs_say_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(moving, "_SILENCE_S", 1.0)
    with Fabric(1) as fabric:
        monkeypatch.setattr(transport, "load", lambda _binding: fabric.verbs)
        with (
            TransferEngine(config(NAMES[1], send_timeout=1)) as theirs,
            TransferEngine(config(NAMES[0], send_timeout=1)) as ours,
        ):
            near, far = ours.allocate(LENGTH), theirs.allocate(LENGTH)
            segment = ours.open_segment(theirs.record())
            assert read(ours, segment, near, int(far.ctypes.data)).wait(LIMIT_S).ok
            for pair in list(fabric._pairs.values()):
                fabric.remove(pair)
            batch = read(ours, segment, near, int(far.ctypes.data))
            batch.cancel()
            assert batch.wait(LIMIT_S).status is Status.CANCELLED
