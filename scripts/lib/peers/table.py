"""Verdicts and turns as tables in Markdown, to be read here and pasted elsewhere. Pure."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

from mooncake_connector.bench.turns import cpu, seconds

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mooncake_connector.bench.conditions import Workload
    from mooncake_connector.bench.turns import Outcome
    from peers.verdicts import Verdict


def verdict_table(verdicts: Iterable[Verdict]) -> str:
    """The table of targets, filled."""
    lines = [("workload", "ours", "against", "measured", "% of limit", "target", "rounds", "")]
    row = ""
    for one in verdicts:
        if one.row != row:
            row = one.row
            lines.append((f"**{row}**", "", "", "", "", "", "", ""))
        lines.append(
            (
                one.workload,
                one.ours,
                one.against,
                "-" if one.value is None else f"{one.value:.2f}",
                "" if one.of_limit is None else f"{100 * one.of_limit:.0f}",
                one.target,
                str(one.rounds or ""),
                _word(one),
            )
        )
    return _markdown(lines)


def _word(one: Verdict) -> str:
    word = {True: "met", False: "**missed**", None: "not measured" if one.target else ""}[one.met]
    return f"{word}: {one.note}" if one.note else word


def variant_table(workload: Workload, outcome: Outcome) -> str:
    """All that took part in one workload, fastest first."""
    turns = [turn for turn in outcome.turns if turn.workload == workload.name]
    names = sorted(
        dict.fromkeys(turn.variant for turn in turns),
        key=lambda name: min(t.latencies.p50 for t in turns if t.variant == name),
    )
    lines = [(workload.name, "p50 us", "best us", "GB/s", "CPU s/GB", "valid / taken")]
    for name in names:
        own = [turn for turn in turns if turn.variant == name]
        counting = [turn for turn in own if turn.valid] or own
        p50 = median(map(seconds, counting))
        lines.append(
            (
                name,
                f"{1e6 * p50:.0f}",
                f"{1e6 * min(turn.latencies.least for turn in own):.0f}",
                f"{own[0].run_bytes / p50 / 1e9:.2f}",
                f"{median(map(cpu, counting)):.2f}",
                f"{outcome.valid_rounds(workload.name, name)} / {len(own)}",
            )
        )
    failed = [failure.variant for failure in outcome.failures if failure.workload == workload.name]
    lines += [(name, "failed", "", "", "", "") for name in failed]
    return _markdown(lines)


def _markdown(lines: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = [
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    ]
    shown.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(shown)
