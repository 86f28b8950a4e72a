"""Two rows that are no turns: a batch of 100 000 descriptors, and the first contact of a pair."""

from __future__ import annotations

import os
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from mooncake_connector.bench.base import BackendFailed, Transfer, Variant
from mooncake_connector.bench.conditions import Workload, workload
from mooncake_connector.bench.handle import ChildSide
from mooncake_connector.bench.pair import Pair
from peers.blocks import KIB, apart, scattered
from peers.verdicts import Verdict

if TYPE_CHECKING:
    from collections.abc import Iterable

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
#: Small, so that copying in user space (shm) weighs little beside what is spent on a descriptor.
DESCRIPTOR = 256
COUNTS = (25_000, 50_000, 100_000)
#: Seconds of CPU outside system calls, both sides, in ticks of 10 ms: a second has 100 of them.
MEASURE_S = 2.0
#: What "linear" permits: time per descriptor at the largest count over that at the smallest.
LINEAR = 1.25


def descriptors(variants: Iterable[Variant], logs: Path) -> list[Verdict]:
    """One batch of many descriptors: time outside system calls, and whether it grows in step.

    Goals are ours. Loops in C stand beside: what each of many costs them more is the machine's, as
    where 25 000 fit into its caches and 100 000 do not.
    """
    row, found = "100 000 descriptors in one batch", []
    works = [
        workload(f"{count} x {DESCRIPTOR} bytes read", apart("read", count, DESCRIPTOR))
        for count in COUNTS
    ]
    for variant in variants:
        ours = variant.backend == "ours"
        blank = Verdict(row=row, workload=f"{works[-1].name}, {variant.name}", target="")
        try:
            spent = [_spent(variant, work, logs) for work in works]
        except BackendFailed as error:
            failed = {"target": "runs", "met": False} if ours else {}
            found.append(msgspec.structs.replace(blank, **failed, note=str(error)))
            continue
        each = [1e6 * took / count for (took, _), count in zip(spent, COUNTS, strict=True)]
        outside = 1e6 * spent[-1][1] / COUNTS[-1]
        growth = msgspec.structs.replace(
            blank,
            ours=", ".join(f"{one:.2f}" for one in each) + " us each",
            against=f"{COUNTS[0]}, {COUNTS[1]}, {COUNTS[2]} descriptors",
            value=each[-1] / each[0],
        )
        if not ours:
            found.append(growth)
            continue
        found += [
            msgspec.structs.replace(
                blank,
                ours=f"{each[-1]:.2f} us each, all in all",
                value=outside,
                target="< 0.30 us of CPU outside system calls each, both sides",
                met=outside < 0.3,
            ),
            msgspec.structs.replace(
                growth, target=f"<= {LINEAR} (linear)", met=each[-1] / each[0] <= LINEAR
            ),
        ]
    return found


def _spent(variant: Variant, work: Workload, logs: Path) -> tuple[float, float]:
    """Seconds of the median run, and user seconds of both sides per run."""
    with Pair(variant, work.buffer_bytes, logs) as pair:
        pair.check(work)
        pair.prepare(work, warm_up_s=0.5)
        assert isinstance(pair.target, ChildSide), "without a target elsewhere it is a child"
        pids = (pair.target.pid, pair.initiator.pid)
        before = sum(map(_user_s, pids))
        reading = pair.measure(MEASURE_S)
        after = sum(map(_user_s, pids))
    runs = reading.samples.size
    return float(statistics.median(reading.samples)), (after - before) / runs


def _user_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) * _TICK_S


def first_contact(
    variants: Iterable[Variant], etcd: str, logs: Path, rounds: int = 5
) -> list[Verdict]:
    """From the first call to the last byte of 4 KiB, in fresh processes that are both up."""
    transfer, took = scattered("read", 1, 4 * KIB), {}
    found = []
    for variant in variants:
        settings = {"metadata_server": etcd} if variant.backend == "ours" else {}
        named = msgspec.structs.replace(variant, options={**variant.options, **settings})
        try:
            took[variant.name] = [_contact(named, transfer, logs) for _ in range(rounds)]
        except BackendFailed as error:
            found.append(
                Verdict(
                    row="first contact",
                    workload=variant.name,
                    target="<= 50 ms",
                    met=False if variant.backend == "ours" else None,
                    note=str(error).splitlines()[0],
                )
            )
            continue
        value = 1e3 * statistics.median(took[variant.name])
        ours = variant.backend == "ours"
        found.append(
            Verdict(
                row="first contact",
                workload=f"4 KiB read, {variant.name}" + (", metadata in etcd" if ours else ""),
                ours=f"{value:.1f} ms",
                against=f"slowest {1e3 * max(took[variant.name]):.1f} ms",
                value=value,
                target="<= 50 ms" if ours else "",
                met=value <= 50.0 if ours else None,
                rounds=rounds,
            )
        )
    return found


def _contact(variant: Variant, transfer: Transfer, logs: Path) -> float:
    with Pair(variant, 1 << 20, logs) as pair:
        return pair.first_contact(transfer)
