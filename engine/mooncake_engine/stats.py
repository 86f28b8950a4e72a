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


class Counters:
    """Safe to call from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards _totals
        self._totals: dict[Key, Totals] = {}

    def count(self, op: Op, end: Completion) -> None:
        """Add one ended batch."""
        key = Key(end.path.scheme, op, end.status)
        with self._lock:
            old = self._totals.get(key, Totals())
            self._totals[key] = Totals(
                old.batches + 1,
                old.nbytes + end.nbytes,
                old.descriptors + end.descriptors,
                old.runs + end.runs,
                old.seconds + end.total_s,
            )

    def snapshot(self) -> dict[Key, Totals]:
        """A copy of the sums."""
        with self._lock:
            return dict(self._totals)
