"""Engines with memory that they know, for faults on real verbs: filled, moved and compared."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from mooncake_engine import TransferEngine
from mooncake_engine.testing.conformance import scattered
from mooncake_engine.testing.target import pattern
from mooncake_engine.types import Op
from rdma_stage import OURS, THEIRS, config
from rdma_watch import kernel_counts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mooncake_engine.batch import Batch
    from mooncake_engine.segment import Segment
    from mooncake_engine.types import Completion, SegmentRecord

MIB = 1 << 20
LENGTH = 4 * MIB
#: A fault is known within this: a dead peer by its control connection, a refusal by its NIC.
LIMIT_S = 5.0
#: What the slowest emulated machine still answers, sent again after 134 ms.
IMPATIENT = {"send_timeout": 15, "send_retry_count": 2}
CONNECT_S = 3.0


class End:
    """An engine with one region of memory."""

    def __init__(self, devices: tuple[str, ...], length: int = LENGTH, **rdma: Any) -> None:  # noqa: ANN401 - settings are of any type
        self.engine = TransferEngine(
            config(*devices, engine={"connect_timeout_s": CONNECT_S}, **{**IMPATIENT, **rdma})
        )
        self.memory = self.engine.allocate(length)
        self.address = int(self.memory.ctypes.data)

    @property
    def record(self) -> SegmentRecord:
        return self.engine.record()

    def open(self, record: SegmentRecord) -> contextlib.closing[Segment]:
        return contextlib.closing(self.engine.open_segment(record))

    def submit(self, op: Op, segment: Segment, *runs: tuple[int, int, int]) -> Batch:
        """Runs are offsets here and in the peer's first region, and lengths."""
        there = segment.record.regions[0].address
        rows = [(self.address + ours, there + theirs, size) for ours, theirs, size in runs]
        return self.engine.submit(op, segment, rows)

    def move(self, op: Op, segment: Segment, *runs: tuple[int, int, int]) -> Completion:
        return self.submit(op, segment, *runs).wait(LIMIT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()


class Pair:
    """An initiator and a target, with memory that they know."""

    def __init__(self, ours: End, theirs: End) -> None:
        self.ours, self.theirs = ours, theirs
        self.at_rest = self.counts()  # no queue pair is there yet

    @staticmethod
    def counts() -> list[dict[str, int]]:
        """What the kernel counts on both devices."""
        return [kernel_counts(name) for name in (OURS[0], THEIRS[0])]

    def fill(self) -> None:
        self.ours.memory[:] = pattern(1, self.ours.memory.size)
        self.theirs.memory[:] = pattern(2, self.theirs.memory.size)

    def check_untouched(self, *sides: End) -> None:
        for seed, side in enumerate((self.ours, self.theirs), 1):
            if side in sides:
                assert np.array_equal(side.memory, pattern(seed, side.memory.size))

    def check_exact(self, segment: Segment, *, seed: int = 3) -> None:
        """Both ways, scattered; every byte of both sides is where it has to be."""
        for op in Op:
            self.fill()
            runs = scattered(seed, op, 256 << 10, 40)
            local, remote = self.ours.memory.copy(), self.theirs.memory.copy()
            rows = np.stack(runs, 1).tolist()
            end = self.ours.move(op, segment, *rows)
            assert end.ok, end.error
            for here, there, size in rows:
                if op is Op.READ:
                    local[here : here + size] = remote[there : there + size]
                else:
                    remote[there : there + size] = local[here : here + size]
            assert np.array_equal(self.ours.memory, local)
            assert np.array_equal(self.theirs.memory, remote)

    def check_serves(self) -> None:
        """With a new connection."""
        with self.ours.open(self.theirs.record) as segment:
            self.check_exact(segment)


def until(what: str, condition: Callable[[], object], limit_s: float = LIMIT_S) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"not within {limit_s:g} s: {what}"
        time.sleep(0.002)


@contextlib.contextmanager
def in_the_middle(ours: End, segment: Segment) -> Iterator[list[Batch]]:
    """More READs than end at once, the first of them ended; afterwards, all of them ended in time.

    They read to the same place, so only the rest of our memory says what they moved.
    """
    batches = [ours.submit(Op.READ, segment, (0, 0, LENGTH // 2)) for _ in range(24)]
    assert batches[0].wait(30).ok
    yield batches
    end = time.monotonic() + LIMIT_S
    for batch in batches:
        batch.wait(max(0.0, end - time.monotonic()))
    assert not batches[-1].wait(0).ok, "all had ended before the fault"
