"""Throughput and latency against block size, as a picture or as one page with its table."""

from __future__ import annotations

import html
import importlib.util
import io
from typing import TYPE_CHECKING

from mooncake_engine.errors import ConfigError

from mooncake_connector.bench.report import columns, heading, text

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mooncake_connector.bench.report import Line

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>body {{ font-family: sans-serif; margin: 2em }} pre {{ overflow-x: auto }}
svg {{ max-width: 100%; height: auto }}</style></head>
<body><h1>{title}</h1>
{picture}
<pre>{table}</pre>
</body></html>
"""


def check_can_plot() -> None:
    """Raise at once, not after half an hour of measuring."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "--plot draws with matplotlib, which is not installed: "
            "pip install 'mooncake-connector[bench]'"
        )


def plot(lines: Sequence[Line], path: Path, title: str) -> None:
    """Write `path`, a .png or a self-contained .html; one curve per variant, op and threads.

    Raises:
        ConfigError: The file cannot be written.
    """
    figure = _figure(lines, title)
    try:
        if path.suffix == ".png":
            figure.savefig(path, dpi=120)
        else:
            path.write_text(_page(lines, figure, title))
    except OSError as exc:
        raise ConfigError(f"cannot write {path}: {exc.strerror}") from exc


def _page(lines: Sequence[Line], figure: Figure, title: str) -> str:
    picture = io.StringIO()
    figure.savefig(picture, format="svg")
    # An SVG inside of HTML starts at its element; what stands before is for XML readers.
    svg = picture.getvalue()
    svg = svg[svg.index("<svg") :]
    shown = columns(lines, peers=any(line.figures and line.figures.ours_over_it for line in lines))
    table = "\n".join([heading(shown), *(text(line, shown) for line in lines)])
    return _PAGE.format(title=html.escape(title), picture=svg, table=html.escape(table))


def _figure(lines: Sequence[Line], title: str) -> Figure:
    # The class and not pyplot: no window, no global state, no display needed.
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(9, 9), layout="constrained")
    bandwidth, latency = figure.subplots(2, sharex=True)
    for label, points in _curves(lines).items():
        blocks = [line.block for line in points]
        look = "o--" if points[0].is_limit else "o-"
        found = [line.figures for line in points if line.figures]
        bandwidth.plot(blocks, [one.bandwidth for one in found], look, label=label)
        (drawn,) = latency.plot(blocks, [one.p50 * 1e6 for one in found], look)
        tails = [one.p99 * 1e6 for one in found]
        latency.plot(blocks, tails, ":", marker=".", color=drawn.get_color())
    figure.suptitle(title)
    _block_axis(bandwidth, sorted({line.block for line in lines}))
    bandwidth.set_ylim(bottom=0)
    bandwidth.set_ylabel("GB/s")
    bandwidth.legend(fontsize="small")
    latency.set_yscale("log")
    latency.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    latency.yaxis.set_major_formatter("{x:g}")
    latency.minorticks_off()
    latency.set_ylabel("one run, us: P50, and P99 dotted")
    latency.set_xlabel("block size, bytes")
    for axes in (bandwidth, latency):
        axes.grid(visible=True, alpha=0.3)
    return figure


def _block_axis(axes: Axes, blocks: list[int]) -> None:
    """Named as one writes them: 4K, 1M; what is no power of two, in bytes."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(blocks, [_short(block) for block in blocks])
    axes.minorticks_off()


def _short(block: int) -> str:
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if block % size == 0:
            return f"{block // size}{unit}"
    return str(block)


def _curves(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """Lines with figures, by what they differ in other than the block size.

    The limit is one curve, whichever of its variants was the best at a block size.
    """
    several_threads = len({line.threads for line in lines}) > 1
    # A request has as many descriptors as its page size makes it: that is no curve of its own.
    several_batches = len({line.batch for line in lines}) > len({line.workload for line in lines})
    curves: dict[str, list[Line]] = {}
    for line in lines:
        if line.figures:
            parts = ["limit" if line.is_limit else line.variant]
            parts += [f"{line.threads} threads"] if several_threads else []
            parts += [f"batch {line.batch}"] if several_batches else []
            curves.setdefault(", ".join(parts), []).append(line)
    return curves
