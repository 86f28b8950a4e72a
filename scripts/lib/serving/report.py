"""The table in the terminal, the ratios below it, and what stands beside them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.table import Table

from serving import overlap, sglang_pages
from serving.verdict import FEWEST_VALID, ratios, summary

if TYPE_CHECKING:
    from rich.console import Console

    from serving.results import Result, Row
    from serving.verdict import Ratio, Summary


def show(result: Result, console: Console) -> None:
    """Everything, the least telling first: the last lines are what is looked at."""
    for row in result.rows:
        if row.needed and row.rounds:
            console.print(f"{row.name} needed: {row.needed}", style="dim", markup=False)
    for row in result.rows:
        if row.error:
            console.print(f"{row.name} was not measured: {row.error}", markup=False)
    if result.pages:
        console.print(sglang_pages.table(result.pages))
    if result.overlap:
        console.print(overlap.table(result.overlap))
    measured = [row for row in result.rows if row.rounds]
    if warning := few_valid(result):
        console.print(warning, markup=False)
    console.print(table(result, measured))
    for line in timer_lines(measured):
        console.print(line, style="dim", markup=False)
    for ratio in ratios(measured):
        console.print(ratio_line(ratio), markup=False, highlight=False)


def table(result: Result, rows: list[Row]) -> Table:
    """In the form that Mooncake's own tables have, and the handover."""
    load = result.load
    shown = Table(
        caption=f"latencies in ms, mean / P99, medians of rounds; {load.requests} requests of "
        f"{load.input_tokens} tokens at {load.rate:g}/s, {load.output_tokens} generated; "
        "handover: one request at a time, the usual order / both legs at once",
    )
    shown.add_column("configuration")
    lengths = sorted({one.tokens for row in rows for each in row.rounds for one in each.handed})
    headings = [
        "idle cores",
        "output tok/s",
        "TTFT",
        "TPOT",
        "ITL",
        *(f"handover {n}" for n in lengths),
    ]
    for heading in [*headings, "same tokens", "rounds (valid)"]:
        shown.add_column(heading, justify="right")
    several = len({row.group for row in rows}) > 1
    for row in rows:
        # The reference is in each group, and only comparable within it.
        name = f"{row.name} (group {row.group})" if several else row.name
        shown.add_row(name, f"{row.idle_cores:.2f}", *_cells(summary(row), lengths))
    return shown


def _cells(of: Summary, lengths: list[int]) -> list[str]:
    return [
        _number(of.output_tokens_s),
        f"{_number(of.ttft_mean, 0)} / {_number(of.ttft_p99, 0)}",
        _number(of.tpot_mean),
        f"{_number(of.itl_mean)} / {_number(of.itl_p99)}",
        *(_both(of, length) for length in lengths),
        f"{of.equal}/{of.asked}" if of.asked else "",
        f"{of.rounds} ({of.valid})",
    ]


def _both(of: Summary, length: int) -> str:
    styles = [_number(each.get(length, math.nan)) or "-" for each in (of.handover, of.at_once)]
    return " / ".join(styles) if of.asked else ""


def _number(value: float, digits: int = 1) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def timer_lines(rows: list[Row]) -> list[str]:
    """What the connectors counted themselves, all rounds together."""
    lines = []
    for row in rows:
        totals: dict[str, float] = {}
        for each in row.rounds:
            for key, value in each.timers.items():
                totals[key] = totals.get(key, 0.0) + value
        if totals.get("seconds"):
            rate = totals.get("bytes", 0.0) / totals["seconds"] / 1e9
            counted = ", ".join(f"{key} {value:.6g}" for key, value in totals.items() if value)
            lines.append(f"{row.name} counted: {counted}; {rate:.2f} GB/s")
    return lines


def ratio_line(ratio: Ratio) -> str:
    """One comparison, and whether it is what was wanted."""
    line = f"{ratio.what}: {ratio.ours} is {ratio.ratio:.2f} of {ratio.peer}"
    if ratio.wanted is None:
        return line
    return f"{line}; wanted <= {ratio.wanted:.2f}: {'yes' if ratio.ratio <= ratio.wanted else 'NO'}"


def few_valid(result: Result) -> str:
    """Said when the machine was too busy for a verdict; empty when it was not."""
    poor = [row.name for row in result.rows if row.rounds and summary(row).valid < FEWEST_VALID]
    if not poor:
        return ""
    return (
        f"fewer than {FEWEST_VALID} rounds were valid (at most 0.2 of a core busy with anything "
        f"else) for {', '.join(poor)}: these medians are of all rounds"
    )
