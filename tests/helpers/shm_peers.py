"""Child processes that hold or read memory, and a lane to one."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from mooncake_engine.transport.shm.transport import Endpoint
from mooncake_engine.types import Op, SegmentRecord, Slice, uint64s

if TYPE_CHECKING:
    from mooncake_engine.transport.shm.lane import ShmLane
    from numpy.typing import ArrayLike, NDArray

CHILD = Path(__file__).with_name("shm_child.py")


class Child:
    """The test's end of a shm_child.py process."""

    def __init__(self, role: str, **options: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(CHILD), role],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.about = self._exchange(options)

    def _exchange(self, message: object) -> Any:  # noqa: ANN401 - whatever the method returned
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def do(self, method: str, **arguments: object) -> Any:  # noqa: ANN401 - as above
        """Call a method of shm_child.py's Target or Reader."""
        return self._exchange([method, arguments])

    @property
    def record(self) -> SegmentRecord:
        return msgspec.msgpack.decode(bytes.fromhex(self.about["record"]), type=SegmentRecord)

    @property
    def endpoint(self) -> Endpoint:
        return msgspec.msgpack.decode(self.record.endpoints["shm"], type=Endpoint)

    def record_with(self, **changes: object) -> SegmentRecord:
        """The record with some fields of its shm endpoint changed."""
        blob = msgspec.msgpack.encode(msgspec.structs.replace(self.endpoint, **changes))
        return msgspec.structs.replace(self.record, endpoints={"shm": msgspec.Raw(blob)})

    def content(self, size: int) -> NDArray[np.uint8]:
        """What the first array of a target held at its start."""
        return np.random.default_rng(0).integers(0, 256, size, np.uint8)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def end(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()
        self.process.stdout.close()


class Reached:
    """One lane to a target."""

    def __init__(self, lane: ShmLane) -> None:
        self.lane = lane

    def move(
        self, op: Op, local: ArrayLike, remote: ArrayLike, lengths: ArrayLike, seconds: float = 20
    ) -> None:
        runs = uint64s(lengths)
        piece = Slice(op, uint64s(local), uint64s(remote), runs, int(runs.sum()), b"")
        self.lane.move(piece, time.monotonic() + seconds)
