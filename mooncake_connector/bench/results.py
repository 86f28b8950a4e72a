"""From turns to the lines of the table, and everything that `--json` writes. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from mooncake_connector.bench.options import Options
from mooncake_connector.bench.report import Figures, Line
from mooncake_connector.bench.turns import Failure, Turn, bandwidth

if TYPE_CHECKING:
    from collections.abc import Callable

    from mooncake_connector.bench.base import Variant
    from mooncake_connector.bench.lineup import Lineup
    from mooncake_connector.bench.turns import Outcome
    from mooncake_connector.bench.workloads import Case


_VALUES: dict[str, Callable[[Turn], float]] = {
    "bandwidth": bandwidth,
    "between": lambda turn: turn.wall_s * turn.threads / turn.latencies.count,
    "mean": lambda turn: turn.latencies.mean,
    "p50": lambda turn: turn.latencies.p50,
    "p99": lambda turn: turn.latencies.p99,
    "p999": lambda turn: turn.latencies.p999,
    "cpu_initiator": lambda turn: turn.initiator_cpu_s_per_gb,
    "cpu_target": lambda turn: turn.target_cpu_s_per_gb,
}


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """All of a run.

    Attributes:
        command: As typed.
        version: Of this package.
        started: UTC, ISO 8601.
        machine: Processor, cores, memory, kernel.
        options: Effective ones.
        lines: The table.
        turns: Every single measurement, those that do not count included.
        failures: Variants that could not do a row.
        notices: What was left out, and why; why rows ended before their rounds were complete.
    """

    command: list[str]
    version: str
    started: str
    machine: dict[str, str]
    options: Options
    lines: tuple[Line, ...]
    turns: tuple[Turn, ...]
    failures: tuple[Failure, ...]
    notices: tuple[str, ...]


def row_name(case: Case, op: str) -> str:
    """Unique in a run."""
    row = case.row
    threads = f", {row.threads} threads" if row.threads > 1 else ""
    return f"{case.workload}: {row.batch} x {row.block} bytes, {op}{threads}"


def blank_lines(case: Case, op: str, lineup: Lineup) -> list[Line]:
    """The row's lines before anything was measured: one for each variant, or the reason."""
    row = case.row
    blank = Line(
        workload=case.workload, op=op, block=row.block, batch=row.batch, threads=row.threads
    )
    if row.skipped:
        return [msgspec.structs.replace(blank, note=f"skipped: {row.skipped}")]
    return [
        msgspec.structs.replace(blank, variant=one.name, is_limit=one.is_limit)
        for one in lineup.variants
    ]


def filled(blanks: list[Line], workload: str, outcome: Outcome, lineup: Lineup) -> list[Line]:
    """The same lines with what was measured, or why it was not; of the limits the best alone."""
    failed = {failure.variant: failure.text for failure in outcome.failures}
    counted = counting(outcome)
    best = _best(counted, workload, lineup.limits)
    lines = []
    for line in blanks:
        if line.is_limit and line.variant != best:
            continue
        figures = _figures(counted, outcome, line, workload, best, lineup.ours.name)
        text = failed.get(line.variant, "" if figures else "no time was left for it")
        note = text.splitlines()[0] if text else ""  # the log's end is on standard error
        lines.append(msgspec.structs.replace(line, figures=figures, note=note))
    return lines


def counting(outcome: Outcome) -> Outcome:
    """Valid turns; all turns of a variant that has none, so that a busy machine shows something.

    The table tells them apart: "0 / 3" valid.
    """
    with_valid = {turn.variant for turn in outcome.turns if turn.valid}
    every = {turn.variant for turn in outcome.turns}
    if every <= with_valid:
        return outcome
    # A ratio needs both of a round, so one variant without valid turns takes all of them along.
    turns = tuple(msgspec.structs.replace(turn, valid=True) for turn in outcome.turns)
    return msgspec.structs.replace(outcome, turns=turns)


def _best(outcome: Outcome, workload: str, limits: tuple[Variant, ...]) -> str:
    found = {one.name: outcome.median(one.name, workload, bandwidth) or 0.0 for one in limits}
    best = max(found, key=lambda name: found[name], default="")
    return best if found.get(best) else ""


def _figures(
    counted: Outcome, outcome: Outcome, line: Line, workload: str, limit: str, ours: str
) -> Figures | None:
    variant = line.variant
    taken = {turn.round for turn in outcome.turns if turn.variant == variant}
    if not taken:
        return None
    return Figures(
        **{
            name: counted.median(variant, workload, value) or 0.0 for name, value in _VALUES.items()
        },
        of_limit=counted.ratio(variant, limit, workload, bandwidth),
        ours_over_it=None
        if line.is_limit or variant == ours
        else counted.ratio(ours, variant, workload, bandwidth),
        valid=outcome.valid_rounds(workload, variant),
        rounds=len(taken),
    )
