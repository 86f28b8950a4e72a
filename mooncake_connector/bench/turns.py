"""What a benchmark measured, and what it comes to: turns, medians, ratios. Pure.

A *turn* is one measurement of one variant. In a *round* each variant has a turn, in an order that
goes on by one from round to round. Only valid turns (`load.py`) count.
"""

from __future__ import annotations

import statistics
from collections import Counter
from typing import TYPE_CHECKING, TypeVar

import msgspec

from mooncake_connector.bench.base import Route
from mooncake_connector.bench.conditions import Condition
from mooncake_connector.bench.percentiles import Latencies

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

T = TypeVar("T")


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement.

    Attributes:
        round: From 0; a turn that was not valid is taken again in the same round.
        run_bytes: Of one run of one thread.
        latencies: Of single runs, in seconds.
        in_place_p50: The median run until its last byte was in place, by the engine's own clock,
            which stops before the caller waits for the interpreter lock; 0 where it has none.
        wall_s: From the first start to the last end.
        gb_per_s: 10**9 bytes, all threads, over `wall_s`.
        initiator_cpu_s_per_gb: User and system, all threads of the process.
        target_cpu_s_per_gb: Of the other process.
        other_load: Cores busy with anything else.
        valid: That was little enough.
    """

    variant: str
    route: Route
    workload: str
    condition: Condition
    round: int
    run_bytes: int
    threads: int
    latencies: Latencies
    in_place_p50: float = 0.0
    wall_s: float
    gb_per_s: float
    initiator_cpu_s_per_gb: float
    target_cpu_s_per_gb: float
    other_load: float
    valid: bool


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """A variant that could not run a workload, and has no more turns of it."""

    variant: str
    workload: str
    text: str


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """All of a run. `ended` says why no further round was taken."""

    turns: tuple[Turn, ...]
    failures: tuple[Failure, ...]
    ended: str

    def median(self, variant: str, workload: str, value: Callable[[Turn], float]) -> float | None:
        """Of the valid turns' values; None without any."""
        values = [value(turn) for turn in self._valid(variant, workload).values()]
        return statistics.median(values) if values else None

    def ratio(
        self, variant: str, other: str, workload: str, value: Callable[[Turn], float]
    ) -> float | None:
        """Median of `variant`'s value over `other`'s in each round where both turns are valid."""
        ours, theirs = self._valid(variant, workload), self._valid(other, workload)
        ratios = [value(ours[number]) / value(theirs[number]) for number in ours.keys() & theirs]
        return statistics.median(ratios) if ratios else None

    def valid_rounds(self, workload: str, *variants: str) -> int:
        """In how many rounds all of these have a valid turn."""
        return len(set.intersection(*(set(self._valid(name, workload)) for name in variants)))

    def _valid(self, variant: str, workload: str) -> dict[int, Turn]:
        """By round."""
        return {
            turn.round: turn
            for turn in self.turns
            if turn.valid and (turn.variant, turn.workload) == (variant, workload)
        }


def seconds(turn: Turn) -> float:
    """What most verdicts are about: the median run."""
    return turn.latencies.p50


def in_place(turn: Turn) -> float:
    """The median run by the engine's own clock, where it has one."""
    return turn.in_place_p50 or turn.latencies.p50


def bandwidth(turn: Turn) -> float:
    """GB/s of all threads."""
    return turn.gb_per_s


def cpu(turn: Turn) -> float:
    """CPU seconds per GB, both sides."""
    return turn.initiator_cpu_s_per_gb + turn.target_cpu_s_per_gb


def rotated(things: Sequence[T], number: int) -> list[T]:
    """The order of a round: each goes first in its turn."""
    start = number % len(things) if things else 0
    return [*things[start:], *things[:start]]


def wanting(turns: Iterable[Turn], pairs: Iterable[tuple[str, str]], rounds: int) -> dict[str, int]:
    """Workloads of which some variant has fewer than `rounds` valid rounds -> the fewest.

    `pairs` are (variant, workload) that take part.
    """
    valid = {(t.variant, t.workload, t.round) for t in turns if t.valid}
    count = Counter((variant, workload) for variant, workload, _ in valid)
    fewest: dict[str, int] = {}
    for pair in pairs:
        if count[pair] < rounds:
            fewest[pair[1]] = min(fewest.get(pair[1], rounds), count[pair])
    return fewest
