"""Counters of ended batches, by transport, direction and status."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from mooncake_engine.types import Completion, Op, Status


class Key(NamedTuple):
    """What is counted apart."""

    scheme: str
    op: Op
    status: Status


class Totals(NamedTuple):
    """Sums since the engine started.

    `nbytes` is what batches asked for (moved only where the status is OK), `descriptors` the runs
    as submitted, `runs` those left after merging, `seconds` from submit to completion.
    """

    batches: int = 0
    nbytes: int = 0
    descriptors: int = 0
    runs: int = 0
    seconds: float = 0.0


_NOTHING = 0, 0, 0, 0, 0.0


class Counters:
    """Safe to call from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards _sums
        # The fields of `Key` and of `Totals`: making those takes longer than adding does.
        self._sums: dict[tuple[str, Op, Status], tuple[int, int, int, int, float]] = {}

    def count(self, op: Op, end: Completion) -> None:
        """Add one ended batch."""
        key = end.path.scheme, op, end.status
        with self._lock:
            batches, nbytes, descriptors, runs, seconds = self._sums.get(key, _NOTHING)
            self._sums[key] = (
                batches + 1,
                nbytes + end.nbytes,
                descriptors + end.descriptors,
                runs + end.runs,
                seconds + end.total_s,
            )

    def snapshot(self) -> dict[Key, Totals]:
        """A copy of the sums."""
        with self._lock:
            return {Key(*key): Totals(*sums) for key, sums in self._sums.items()}
