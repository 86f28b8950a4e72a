"""How busy the machine was with anything but the benchmark, which decides whether a turn counts.

The rule, fixed before any run: a turn is valid when other work took no more than `OTHER_LOAD_LIMIT`
of a core while it was measured. Other work is what all cores were busy with, less the CPU time of
this process and its descendants (both sides, and loops that are busy on purpose) and of ksoftirqd,
which passes on packets that the sockets measured here sent faster than they were taken; and never
less than what the hypervisor took away, as some kernels count that as the running process' own.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple

#: Cores. On two cores 0.2 is a tenth of the machine; an idle one here has 0.01 to 0.05.
OTHER_LOAD_LIMIT = 0.2

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_PROC = Path("/proc")
_SOFTIRQ = " (ksoftirqd/"


class Sample(NamedTuple):
    """Counters at one moment, in seconds."""

    at: float  # time.monotonic()
    busy: float  # of all cores, stolen time included
    stolen: float
    ours: float  # this process and its descendants


def other_load(before: Sample, after: Sample) -> float:
    """Cores that were busy with something else between the two."""
    busy = (after.busy - before.busy) - (after.ours - before.ours)
    return max(busy, after.stolen - before.stolen, 0.0) / (after.at - before.at)


def is_valid(other: float) -> bool:
    """The rule."""
    return other <= OTHER_LOAD_LIMIT


def sample(root: int | None = None) -> Sample:
    """Now; `root` is the process whose tree is ours, by default this one."""
    busy, stolen = machine_seconds((_PROC / "stat").read_text())
    stats = [text for path in _PROC.glob("[0-9]*/stat") if (text := _read(path))]
    return Sample(time.monotonic(), busy, stolen, tree_seconds(stats, root or os.getpid()))


def machine_seconds(stat: str) -> tuple[float, float]:
    """Busy and stolen seconds of all cores since boot, from /proc/stat's first line."""
    user, nice, system, _idle, _iowait, irq, softirq, stolen = (
        int(word) for word in stat.split("\n", 1)[0].split()[1:9]
    )
    busy = user + nice + system + irq + softirq + stolen  # guests' time is in user and nice
    return busy * _TICK_S, stolen * _TICK_S


def tree_seconds(stats: list[str], root: int) -> float:
    """User and system seconds of `root`, all below it and ksoftirqd; from each /proc/*/stat.

    Of children that ended and were waited for, too: their parents carry their time.
    """
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for text in stats:
        head, _, tail = text.rpartition(")")  # a name may hold spaces and brackets
        fields = tail.split()
        pid = int(head.partition(" ")[0])
        parents[pid] = root if _SOFTIRQ in head else int(fields[1])
        ticks[pid] = sum(int(field) for field in fields[11:15])
    return _TICK_S * sum(spent for pid, spent in ticks.items() if _below(pid, root, parents))


def _below(pid: int, root: int, parents: dict[int, int]) -> bool:
    while pid != root and pid in parents:
        pid = parents[pid]
    return pid == root


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # it ended meanwhile
        return ""
