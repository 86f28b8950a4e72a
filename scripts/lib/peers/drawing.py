"""A picture of the verdicts: how far each ratio lies above or below its target."""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from peers.verdicts import Verdict

MET, MISSED = "#2a7f62", "#b3452c"


def check_can_draw(file: Path) -> None:
    """Exit with one sentence when a picture cannot be made, before anything is measured."""
    if not importlib.util.find_spec("matplotlib"):
        sys.exit("--plot needs matplotlib: pip install 'mooncake-connector[bench]'")
    if file.suffix not in (".png", ".svg", ".pdf"):
        sys.exit(f"--plot {file}: name a .png, .svg or .pdf")


def draw(verdicts: Iterable[Verdict], file: Path) -> None:
    """One bar for each comparison in which more is better; the target is the black stroke."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    shown = [one for one in verdicts if one.value and one.target.startswith(">")]
    if not shown:
        return
    figure, axes = pyplot.subplots(figsize=(11, 1.2 + 0.32 * len(shown)))
    for place, one in enumerate(reversed(shown)):
        assert one.value is not None, "those without were left out"
        goal = float(one.target.split()[1])
        axes.barh(place, one.value, color=MET if one.met else MISSED, height=0.6)
        axes.plot([goal, goal], [place - 0.4, place + 0.4], color="black", linewidth=2)
        axes.annotate(
            f" {one.value:.2f}", (max(one.value, goal), place), va="center", fontsize="small"
        )
    axes.axvline(1, color="grey", linewidth=0.5)
    axes.set_xscale("log")
    names = [f"{_ours(one)} / {_rival(one)}" for one in shown]
    axes.set_yticks(range(len(shown)), reversed(names), fontsize="small")
    axes.set_xlabel("times as fast as (black: target)")
    figure.savefig(file, bbox_inches="tight", dpi=120)
    pyplot.close(figure)


def _ours(one: Verdict) -> str:
    """The workload, with our setting and without our figure."""
    return "".join([one.workload, *one.ours.partition(";")[0].partition(", ")[1:]])


def _rival(one: Verdict) -> str:
    """Without its figure."""
    words = one.against.split(" ")
    return " ".join(words[:-2]) if words[-1:] in (["GB/s"], ["us"], ["ms"]) else one.against
