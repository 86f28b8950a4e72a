"""A picture of a run: `python -m serving.plot RESULT.json FILE.png|FILE.html`.

A program of its own, because matplotlib is in none of the frameworks' environments.
"""

from __future__ import annotations

import html
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from matplotlib.figure import Figure
from rich.console import Console

from serving.report import show
from serving.results import Result
from serving.verdict import summary

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.axes import Axes

    from serving.results import Row
    from serving.verdict import Summary

COLOURS = {"ours": "tab:blue", "peer": "tab:orange", "aggregated": "0.5", "regular": "0.7"}
PANELS: dict[str, Callable[[Summary], float]] = {
    "mean TTFT, ms": lambda of: of.ttft_mean,
    "mean ITL, ms": lambda of: of.itl_mean,
    "P99 ITL, ms": lambda of: of.itl_p99,
}
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>scripts/bench serving</title>
<style>body {{ font-family: sans-serif; margin: 2em }} pre {{ overflow-x: auto }}
svg {{ max-width: 100%; height: auto }}</style></head>
<body><h1>scripts/bench serving</h1>
{picture}
<pre>{table}</pre>
</body></html>
"""


def plot(result: Result, path: Path) -> None:
    """Write `path`: a .png, or an .html that needs no other file."""
    figure = drawn([row for row in result.rows if row.rounds])
    if path.suffix == ".png":
        figure.savefig(path, dpi=120)
        return
    picture, text = io.StringIO(), io.StringIO()
    figure.savefig(picture, format="svg")
    show(result, Console(file=text, width=180))
    svg = picture.getvalue()
    path.write_text(
        PAGE.format(picture=svg[svg.index("<svg") :], table=html.escape(text.getvalue()))
    )


def drawn(rows: list[Row]) -> Figure:
    """Bars: one panel per latency under load, one per length of prompt for the handover."""
    lengths = sorted({one.tokens for row in rows for each in row.rounds for one in each.handed})
    wide = max(len(PANELS), len(lengths))
    high = 2 if lengths else 1
    figure = Figure(figsize=(4.5 * wide, high * (0.8 + 0.35 * len(rows))), layout="constrained")
    axes = figure.subplots(high, wide, squeeze=False)
    several = len({row.group for row in rows}) > 1
    names = [f"{row.name} ({row.group})" if several else row.name for row in rows]
    found = {name: (summary(row), COLOURS[row.kind]) for name, row in zip(names, rows, strict=True)}
    for panel, (title, value) in zip(axes[0], PANELS.items(), strict=False):
        _bars(panel, title, [(name, value(of), colour) for name, (of, colour) in found.items()])
    for panel, length in zip(axes[-1] if lengths else (), lengths, strict=False):
        # A bar for each style: one is not to be compared with the other.
        bars = [
            (f"{name}{suffix}", handover[length], colour)
            for name, (of, colour) in found.items()
            for suffix, handover in (("", of.handover), (", at once", of.at_once))
            if length in handover
        ]
        _bars(panel, f"handover, {length} tokens, ms", bars)
    for panel in axes.flat:
        panel.set_visible(panel.has_data())
    return figure


def _bars(panel: Axes, title: str, bars: list[tuple[str, float, str]]) -> None:
    names, values, colours = zip(*bars, strict=True)
    drawn_bars = panel.barh(names, values, color=colours)
    panel.bar_label(drawn_bars, fmt="%.1f", padding=2)
    panel.invert_yaxis()
    panel.margins(x=0.25)
    panel.set_title(title)


def main() -> None:
    """Read, draw, write."""
    source, target = map(Path, sys.argv[1:3])
    plot(msgspec.json.decode(source.read_bytes(), type=Result), target)


if __name__ == "__main__":
    main()
