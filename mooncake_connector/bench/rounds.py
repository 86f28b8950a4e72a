"""Takes turns until every variant has enough valid ones, or time is over."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Self

import msgspec
import numpy as np
from mooncake_engine.transport.shm.arena import available_bytes

from mooncake_connector.bench.base import BackendFailed
from mooncake_connector.bench.load import is_valid, other_load, sample
from mooncake_connector.bench.pair import Pair
from mooncake_connector.bench.percentiles import latencies
from mooncake_connector.bench.turns import Failure, Outcome, Turn, rotated, wanting

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence
    from pathlib import Path

    from mooncake_connector.bench.base import Variant
    from mooncake_connector.bench.conditions import Workload

#: Of the memory that is free: what the buffers of all open pairs may take.
_MEMORY_SHARE = 0.6


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How to measure.

    Attributes:
        rounds: Valid ones wanted of each variant and workload.
        at_most: Rounds in all, valid or not; 0: as many as it takes.
        limit_s: No turn begins later than this after the first.
        turn_s: How long a turn measures; the run under way is finished.
        warm_up_s: Before each.
        retakes: How often a turn that was not valid is taken again, at once.
        check: Compare every byte before a variant's first turn of a workload.
    """

    rounds: int = 5
    at_most: int = 0
    limit_s: float = 1800.0
    turn_s: float = 0.5
    warm_up_s: float = 0.3
    retakes: int = 2
    check: bool = False


class Pairs:
    """The variants' processes: started when first needed, stopped between their turns.

    As many stay open as half of the free memory holds; with a target elsewhere, whose side cannot
    be stopped between turns, only one.
    """

    def __init__(self, nbytes: int, logs: Path, target: str = "") -> None:
        """All with buffers of `nbytes`; the rest as for `Pair`."""
        self._nbytes, self._logs, self._target = nbytes, logs, target
        self._most = 1 if target else max(1, int(_MEMORY_SHARE * available_bytes() / (2 * nbytes)))
        self._open: dict[str, Pair] = {}  # in the order of their last turns

    @contextlib.contextmanager
    def running(self, variant: Variant) -> Iterator[Pair]:
        """Its pair, running while inside. One that failed inside is closed."""
        pair = self._open.pop(variant.name, None)
        if pair is None:
            while len(self._open) >= self._most:
                # Turns go round: the one that had its turn last is needed again last.
                self._open.popitem()[1].close()
            pair = Pair(variant, self._nbytes, self._logs, self._target)
        with contextlib.ExitStack() as failing:
            failing.callback(pair.close)
            pair.resume()
            yield pair
            pair.suspend()
            failing.pop_all()
            self._open[variant.name] = pair

    def close(self) -> None:
        """End all of them, initiators first and side by side; idempotent."""
        pairs = list(self._open.values())
        for sides in ([pair.initiator for pair in pairs], [pair.target for pair in pairs]):
            for side in sides:
                side.hang_up()
            for side in sides:
                side.close()
        self._open.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def run_rounds(
    pairs: Pairs,
    variants: Sequence[Variant],
    workloads: Sequence[Workload],
    plan: Plan,
    report: Callable[[Turn | Failure], None] = lambda _: None,
    taking: Collection[tuple[str, str]] | None = None,
) -> Outcome:
    """Measure all variants by turns; each workload with those of its routes.

    With `taking`, (variant, workload), only those of them.

    Never raises for a variant that fails: that is in the outcome, and it has no more turns of
    that workload. `report` hears of each turn as it ends.
    """
    run = _Run(pairs, plan, report)
    run.taking = {
        (variant.name, workload.name)
        for variant in variants
        for workload in workloads
        if not workload.routes or variant.route in workload.routes
        if taking is None or (variant.name, workload.name) in taking
    }
    number = 0
    while (fewest := run.wanting()) and not run.over() and number != (plan.at_most or None):
        for workload in workloads:
            for variant in rotated(variants, number):
                if workload.name in fewest and (variant.name, workload.name) in run.taking:
                    run.round(variant, workload, number)
        number += 1
    return Outcome(turns=tuple(run.turns), failures=tuple(run.failures), ended=run.why())


class _Run:
    """What was measured so far."""

    def __init__(self, pairs: Pairs, plan: Plan, report: Callable[[Turn | Failure], None]) -> None:
        self._pairs, self._plan, self._report = pairs, plan, report
        self._deadline = time.monotonic() + plan.limit_s
        self._checked: set[tuple[str, str]] = set()
        self.taking: set[tuple[str, str]] = set()  # (variant, workload) that still take part
        self.turns: list[Turn] = []
        self.failures: list[Failure] = []

    def wanting(self) -> dict[str, int]:
        return wanting(self.turns, self.taking, self._plan.rounds)

    def over(self) -> bool:
        return time.monotonic() >= self._deadline

    def why(self) -> str:
        fewest = self.wanting()
        if not fewest:
            return f"{self._plan.rounds} valid rounds of each"
        found = ", ".join(f"{name} {count}" for name, count in sorted(fewest.items()))
        limit = f"the limit of {self._plan.limit_s:.0f} s"
        if self._plan.at_most and not self.over():
            limit = f"{self._plan.at_most} rounds, no more were asked for"
        return f"{limit}; valid rounds there are of {found}"

    def round(self, variant: Variant, workload: Workload, number: int) -> None:
        """One valid turn, or as many as are allowed."""
        try:
            for _ in range(1 + self._plan.retakes):
                if self.over():
                    return
                turn = self._turn(variant, workload, number)
                self.turns.append(turn)
                self._report(turn)
                if turn.valid:
                    return
        except BackendFailed as error:
            failure = Failure(variant=variant.name, workload=workload.name, text=str(error))
            self.failures.append(failure)
            self.taking.discard((variant.name, workload.name))
            self._report(failure)

    def _turn(self, variant: Variant, workload: Workload, number: int) -> Turn:
        with self._pairs.running(variant) as pair:
            self._check(pair, workload)
            pair.prepare(workload, self._plan.warm_up_s)
            with pair.beside(workload.condition):
                before = sample()
                reading = pair.measure(self._plan.turn_s)
                after = sample()
        gigabytes = reading.nbytes / 1e9
        other = other_load(before, after)
        return Turn(
            variant=variant.name,
            route=variant.route,
            workload=workload.name,
            condition=workload.condition,
            round=number,
            run_bytes=workload.run_bytes,
            threads=len(workload.work),
            latencies=latencies(reading.samples),
            in_place_p50=float(np.median(reading.in_place)) if reading.in_place.size else 0.0,
            wall_s=reading.wall_s,
            gb_per_s=gigabytes / reading.wall_s,
            initiator_cpu_s_per_gb=reading.initiator_cpu_s / gigabytes,
            target_cpu_s_per_gb=reading.target_cpu_s / gigabytes,
            other_load=other,
            valid=is_valid(other),
        )

    def _check(self, pair: Pair, workload: Workload) -> None:
        key = (pair.variant.name, workload.name)
        if self._plan.check and pair.variant.moves_bytes and key not in self._checked:
            pair.check(workload)
            self._checked.add(key)
