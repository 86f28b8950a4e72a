"""The lines of the result: as a table for people, and as JSON. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """Medians over a line's rounds: the valid ones, or all where none was valid. Times in seconds.

    Attributes:
        bandwidth: GB/s (10**9 bytes) of all threads together.
        between: From one run to the next of the same thread, so with the caller's own work.
        mean: Of single runs, from the call to the last byte in place; so are the percentiles.
        cpu_initiator: CPU seconds of the process per GB; None: not known.
        cpu_target: Of the other process.
        of_limit: Bandwidth over the best limit's, median of the rounds' ratios; None: no limit.
        ours_over_it: Our default variant's bandwidth over this one's, likewise; None for itself and
            for a limit.
        valid: Rounds with an otherwise idle machine.
        rounds: Rounds in all.
    """

    bandwidth: float
    between: float
    mean: float
    p50: float
    p99: float
    p999: float
    cpu_initiator: float | None
    cpu_target: float | None
    of_limit: float | None = None
    ours_over_it: float | None = None
    valid: int
    rounds: int


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One variant's result for one row, or the row alone.

    Attributes:
        workload: "sweep", or the request and its page size.
        block: Bytes of a descriptor.
        batch: Descriptors of a run of one thread.
        note: Why there are no figures.
    """

    workload: str
    op: str
    block: int
    batch: int
    threads: int
    variant: str = ""
    is_limit: bool = False
    note: str = ""
    figures: Figures | None = None


class Column(NamedTuple):
    """A heading and how wide its cells are."""

    title: str
    width: int


def columns(lines: Iterable[Line], *, peers: bool) -> list[Column]:
    """The columns of tebench, and ours; what is the same in every line has none."""
    lines = list(lines)
    first = [
        _column("Workload", {line.workload for line in lines}),
        _column("Variant", {line.variant for line in lines} - {""}),
        _column("Op", {line.op for line in lines}),
        _column("Threads", {str(line.threads) for line in lines}),
    ]
    return [
        *(column for column in first if column),
        Column("BlkSize (B)", 11),
        Column("Batch", 7),
        Column("BW (GB/s)", 9),
        Column("Avg Lat (us)", 12),
        Column("Avg Tx (us)", 12),
        Column("P99 Tx (us)", 12),
        Column("P999 Tx (us)", 12),
        Column("% of limit", 10),
        *([Column("ours / it", 9)] if peers else []),
        Column("CPU s/GB", 13),
        Column("valid", 7),
    ]


def heading(shown: list[Column]) -> str:
    """The first line of the table."""
    return "  ".join(column.title.ljust(column.width) for column in shown).rstrip()


def text(line: Line, shown: list[Column]) -> str:
    """A line of the table."""
    cells = _cells(line)
    row = "  ".join(cells.get(column.title, "").ljust(column.width) for column in shown)
    return f"{row.rstrip()}  {line.note}".rstrip()


def _column(title: str, values: set[str]) -> Column | None:
    if len(values) < 2:
        return None
    return Column(title, max(map(len, [title, *values])))


def _cells(line: Line) -> dict[str, str]:
    cells = {
        "Workload": line.workload,
        "Variant": line.variant,
        "Op": line.op,
        "Threads": str(line.threads),
        "BlkSize (B)": str(line.block),
        "Batch": str(line.batch),
    }
    figures = line.figures
    if figures is None:
        return cells
    return cells | {
        "BW (GB/s)": f"{figures.bandwidth:.3f}",
        "Avg Lat (us)": _us(figures.between),
        "Avg Tx (us)": _us(figures.mean),
        "P99 Tx (us)": _us(figures.p99),
        "P999 Tx (us)": _us(figures.p999),
        "% of limit": "" if figures.of_limit is None else f"{100 * figures.of_limit:.0f}",
        "ours / it": "" if figures.ours_over_it is None else f"{figures.ours_over_it:.2f}",
        "CPU s/GB": f"{_cpu(figures.cpu_initiator)} + {_cpu(figures.cpu_target)}",
        "valid": f"{figures.valid} / {figures.rounds}",
    }


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}"


def _cpu(seconds: float | None) -> str:
    return "?" if seconds is None else f"{seconds:.2f}"
