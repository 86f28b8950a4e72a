from __future__ import annotations

import threading

import numpy as np
import pytest
from bench_stage import BUFFER, scattered

from mooncake_connector.bench.backends import ours
from mooncake_connector.bench.base import BackendFailed, Initiator
from mooncake_connector.bench.workers import Stop, Workers


class Counting(Initiator):
    """An engine in C that moves nothing, in no time."""

    def __init__(self) -> None:
        self.threads: set[str] = set()
        self.released = 0
        self.asked: list[int] = []

    def connect(self, address: object) -> None: ...

    def prepare(self, transfer: object) -> Counting:
        assert transfer is not None
        self.threads.add(threading.current_thread().name)
        return self

    def __call__(self) -> None: ...

    def many(self, count: int) -> np.ndarray:
        self.asked.append(count)
        return np.full(count, 0.01)

    def close(self) -> None:
        self.released += 1


def test_a_loop_in_c_takes_the_time_itself() -> None:
    engine = Counting()
    workers = Workers(engine, [[scattered("read", 2)], [scattered("read", 2)]])
    timed = workers.run(Stop(0.0, runs=25))
    workers.close()
    assert len(engine.threads) == engine.released == 2
    assert [len(each.samples) for each in timed] == [25, 25]
    assert all((each.samples == 0.01).all() for each in timed)
    assert timed[0].nbytes == 25 * scattered("read", 2).nbytes
    assert sorted(engine.asked) == [1, 1, 4, 4, 10, 10, 10, 10]  # 0.1 s of runs in a call at most


def test_what_a_backend_raises_while_preparing_comes_out() -> None:
    memory = np.zeros(BUFFER, np.uint8)
    initiator = ours.Initiator(memory, {"protocol": "tcp"})
    try:
        with pytest.raises(BackendFailed, match="nobody"):
            initiator.connect({"name": "nobody", "memory": "0"})
        with pytest.raises(AssertionError, match="connect comes first"):
            Workers(initiator, [[scattered("read", 2)]])
    finally:
        initiator.close()
