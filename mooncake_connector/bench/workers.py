"""The threads that measure: each prepares its own transfers, and runs them in turn."""

from __future__ import annotations

import itertools
import threading
import time
from array import array
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray

    from mooncake_connector.bench.base import Initiator, Transfer

T = TypeVar("T")

#: Runs in one call of `many`, and how long such a call may be: the end of a turn waits for it.
MANY_RUNS, MANY_S = 4096, 0.1


class Stop(NamedTuple):
    """After so many runs; or, when that is 0, with the first run that ends after so long."""

    seconds: float
    runs: int = 0


class Timed(NamedTuple):
    """What one thread did."""

    started: float  # time.perf_counter()
    ended: float
    samples: NDArray[np.float64]  # seconds of each run, in order
    in_place: NDArray[np.float64]  # ditto, by the engine's own clock; empty where it has none
    nbytes: int


class Workers:
    """One thread for each entry of `work`. Errors of the backend come out of every method."""

    def __init__(self, initiator: Initiator, work: Sequence[Sequence[Transfer]]) -> None:
        self._work = work
        # One executor for each thread: what was prepared on a thread is run on it.
        self._threads = [ThreadPoolExecutor(1, f"bench-{number}") for number in range(len(work))]
        self._calls: list[list[Callable[[], float | None]]] = []
        try:
            self._calls = self._each(
                lambda number: [initiator.prepare(transfer) for transfer in work[number]]
            )
        except BaseException:
            self.close()
            raise

    def _each(self, act: Callable[[int], T]) -> list[T]:
        futures = [thread.submit(act, number) for number, thread in enumerate(self._threads)]
        return [future.result() for future in futures]

    def run(self, stop: Stop) -> list[Timed]:
        """All threads begin together; returns when the last has ended."""
        together = threading.Barrier(len(self._threads))

        def timed(number: int) -> Timed:
            together.wait()
            calls, sizes = self._calls[number], [t.nbytes for t in self._work[number]]
            started = time.perf_counter()
            many = getattr(calls[0], "many", None) if len(calls) == 1 else None
            if many is not None:
                samples = in_place = _by_many(many, stop, started)
                # Without what lies between the calls: programs that start, waits for the lock.
                ended = started + float(samples.sum())
            else:
                samples, in_place = _samples(calls, stop, started)
                ended = time.perf_counter()
            rounds, rest = divmod(len(samples), len(sizes))
            moved = rounds * sum(sizes) + sum(sizes[:rest])
            return Timed(started, ended, samples, in_place, moved)

        return self._each(timed)

    def close(self) -> None:
        """Let go of what was prepared, end the threads; idempotent."""
        calls, self._calls = self._calls, []
        if calls:
            self._each(lambda number: _release(calls[number]))
        for thread in self._threads:
            thread.shutdown()


def _release(calls: Iterable[object]) -> None:
    for call in calls:
        release = getattr(call, "close", None)
        if release is not None:
            release()


def _samples(
    calls: Sequence[Callable[[], float | None]], stop: Stop, started: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    samples, in_place = array("d"), array("d")
    until = started + stop.seconds
    for call in itertools.cycle(calls):
        before = time.perf_counter()
        took = call()
        after = time.perf_counter()
        samples.append(after - before)
        if took is not None:
            in_place.append(took)
        if len(samples) == stop.runs or (not stop.runs and after >= until):
            break
    return np.frombuffer(samples), np.frombuffer(in_place) if in_place else np.empty(0)


def _by_many(
    many: Callable[[int], NDArray[np.float64]], stop: Stop, started: float
) -> NDArray[np.float64]:
    """The same for a loop that takes the time of each run itself, in C."""
    parts = [many(1)]
    done, until = 1, started + stop.seconds
    while done < stop.runs or (not stop.runs and time.perf_counter() < until):
        each = max(float(parts[-1].mean()), 1e-7)
        left = stop.runs - done if stop.runs else int((until - time.perf_counter()) / each) + 1
        parts.append(many(max(1, min(left, MANY_RUNS, int(MANY_S / each)))))
        done += len(parts[-1])
    return np.concatenate(parts)
