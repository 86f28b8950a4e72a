"""A link whose lanes write down what they move, and batches for a worker without an engine."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from engines import SOON
from mooncake_engine import Path, Status
from mooncake_engine.batch import Batch, Failure
from mooncake_engine.slicing import Plan, cut, descriptors
from mooncake_engine.transport.base import Lane, Link
from mooncake_engine.types import Op

if TYPE_CHECKING:
    from collections.abc import Callable

    from mooncake_engine import Completion
    from mooncake_engine.types import Slice
    from mooncake_engine.worker import LinkWorker

PIECE = 4096


class RecordingLink(Link):
    """Lanes that write down what they move; `lanes` of them."""

    def __init__(self, lanes: int = 1, move: Callable[[Slice], None] | None = None) -> None:
        self.lanes = lanes
        self.open_lanes: set[Lane] = set()
        self.moved: list[Slice] = []
        self.movers: list[threading.Thread] = []
        self.closed = False
        self.do = move or (lambda _piece: None)

    def open_lane(self) -> Lane:
        lane = RecordingLane(self)
        self.open_lanes.add(lane)
        return lane

    def close(self) -> None:
        self.closed = True


class RecordingLane(Lane):
    def __init__(self, link: RecordingLink) -> None:
        self.link = link

    def move(self, piece: Slice, deadline: float) -> None:
        assert deadline > time.monotonic()
        self.link.movers.append(threading.current_thread())
        self.link.do(piece)
        self.link.moved.append(piece)

    def interrupt(self) -> None:
        pass

    def close(self) -> None:
        self.link.open_lanes.discard(self)


def batch_of(
    worker: LinkWorker, pieces: int, ended: Callable[[Completion], object] = lambda _end: None
) -> Batch:
    runs = descriptors([(PIECE, PIECE, PIECE * pieces)], None, None)
    whole = cut(Op.READ, runs, b"", 1 << 30)[0]
    plan = Plan(Op.READ, runs, [whole] * pieces, whole.nbytes * pieces, 1)
    return Batch(plan, Path("test", ""), SOON, worker.stop, lambda _batch, end: ended(end))


def close(worker: LinkWorker) -> None:
    worker.close(Failure(Status.CANCELLED, "the test is over"))
