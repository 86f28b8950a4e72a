"""Counters of ended batches, by transport, direction and status."""

from __future__ import annotations

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


class Tally:
    """Adds up what is counted together: batches of one `Key`."""

    __slots__ = ("_batches", "_descriptors", "_nbytes", "_runs", "_seconds")

    def __init__(self) -> None:
        self._batches = self._nbytes = self._descriptors = self._runs = 0
        self._seconds = 0.0

    def add(self, end: Completion) -> None:
        """One ended batch."""
        self._batches += 1
        self._nbytes += end.nbytes
        self._descriptors += end.descriptors
        self._runs += end.runs
        self._seconds += end.total_s

    def totals(self) -> Totals:
        """So far."""
        return Totals(self._batches, self._nbytes, self._descriptors, self._runs, self._seconds)


class Counters:
    """One thread at a time: who counts has a lock for it anyway."""

    def __init__(self) -> None:
        self._tallies: dict[tuple[str, Op, Status], Tally] = {}

    def tally(self, scheme: str, op: Op, status: Status) -> Tally:
        """Where such batches are added."""
        key = scheme, op, status
        tally = self._tallies.get(key)
        if tally is None:
            tally = self._tallies[key] = Tally()
        return tally

    def snapshot(self) -> dict[Key, Totals]:
        """What was counted at least once."""
        every = {Key(*key): tally.totals() for key, tally in self._tallies.items()}
        return {key: totals for key, totals in every.items() if totals.batches}
