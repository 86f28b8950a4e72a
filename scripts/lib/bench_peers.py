"""Ours, the peers and the machine's limits side by side: fills the project's table of targets."""

from __future__ import annotations

import argparse
import importlib
import itertools
import os
import platform
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, cast

import msgspec
from harness.servers import Servers
from peers import alone, drawing
from peers.rows import LIMITS, OURS, PEERS, Group, groups, quick
from peers.table import variant_table, verdict_table
from peers.verdicts import Verdict, in_the_running, joined, verdicts

from mooncake_connector.bench.rounds import Pairs, Plan, run_rounds
from mooncake_connector.bench.turns import Failure, Turn

if TYPE_CHECKING:
    from mooncake_connector.bench.base import Backend, Route, Variant
    from mooncake_connector.bench.turns import Outcome

#: Of a group's time, what its first round may take: it starts processes and compares bytes.
FIRST_ROUND = 0.5
#: Groups with smaller buffers share processes, whose pages one cannot have of every size.
SMALL = 64 << 20
DESCRIPTORS, CONTACT = "descriptors", "contact"
#: A turn's own time, its warm-up, and what stopping, preparing and sampling take beside.
WARM_UP_S, BESIDE_S = 0.25, 0.25
#: Whose first contact is measured: each engine as it comes.
AS_THEY_COME = {"ours tcp", "ours shm", "NIXL tcp", "NIXL cma", "Mooncake tcp", "UCX tcp"}
#: In C, beside our own batch of many descriptors.
LOOPS = {"C sockets, 2 streams", "process_vm in C, 2 threads"}
WHEELS = (
    "mooncake-transfer-engine-non-cuda",
    "nixl-cu12",
    "libucx-cu12",
    "pyzmq",
    "torch",
    "numpy",
)


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """All of a run, as `--json` writes it.

    Attributes:
        versions: Of the wheels, and of the machine.
        ended: By group, why no further round was taken.
        turns: Every single measurement, those that do not count included.
    """

    command: list[str]
    versions: dict[str, str]
    ended: dict[str, str]
    verdicts: tuple[Verdict, ...]
    turns: tuple[Turn, ...]
    failures: tuple[Failure, ...]


class Bench:
    """What was measured so far."""

    def __init__(self, plan: Plan, logs: Path) -> None:
        self._plan, self._logs = plan, logs
        self.verdicts: list[Verdict] = []
        self.ended: dict[str, str] = {}
        self.turns: list[Turn] = []
        self.failures: list[Failure] = []

    def group(self, group: Group, variants: list[Variant], pairs: Pairs, limit_s: float) -> None:
        """Measure one group and print what its variants did."""
        tell(f"{group.title}: {len(variants)} variants, at most {limit_s:.0f} s")
        outcome = self._measured(group, variants, pairs, time.monotonic() + limit_s)
        limits = [variant.name for variant in variants if variant.is_limit]
        self.verdicts += verdicts(group, outcome, limits)
        self.ended[group.key] = outcome.ended
        self.turns += outcome.turns
        self.failures += outcome.failures
        for workload in group.workloads:
            print(f"\n{variant_table(workload, outcome)}", flush=True)
        tell(f"{group.title}: {outcome.ended}")

    def _measured(self, group: Group, variants: list[Variant], pairs: Pairs, end: float) -> Outcome:
        """A round of all, then the other rounds of those that are in the running."""

        def rounds(count: int, share: float, taking: set[tuple[str, str]] | None = None) -> Outcome:
            plan = msgspec.structs.replace(
                self._plan,
                rounds=count,
                turn_s=group.turn_s,
                limit_s=max(0.0, share * (end - time.monotonic())),
            )
            return run_rounds(pairs, variants, group.workloads, plan, _told, taking)

        if self._plan.rounds == 1 or self._plan.at_most:
            return rounds(self._plan.rounds, 1.0)
        first = rounds(1, FIRST_ROUND)
        running = in_the_running(group, variants, first)
        tell(f"further rounds have {len(running)} turns: ours, and of each goal's rivals the best")
        return joined(first, rounds(self._plan.rounds - 1, 1.0, running))

    def descriptors(self, variants: list[Variant]) -> None:
        """The row of 100 000 descriptors."""
        tell("100 000 descriptors in one batch")
        self.verdicts += alone.descriptors(variants, self._logs)

    def contact(self, variants: list[Variant], rounds: int) -> None:
        """The row of the first contact, with a real etcd."""
        tell("first contact")
        with Servers(self._logs, Path()) as servers:
            etcd = servers.etcd()
            self.verdicts += alone.first_contact(variants, etcd, self._logs, rounds)

    def record(self) -> Record:
        """For the files."""
        return Record(
            command=[Path(sys.argv[0]).name, *sys.argv[1:]],
            versions=_versions(),
            ended=self.ended,
            verdicts=tuple(self.verdicts),
            turns=tuple(self.turns),
            failures=tuple(self.failures),
        )


def main() -> None:
    """Measure what was asked for; exit status 1 when ours failed, or in --quick was slower."""
    options = _options()
    logs = Path(tempfile.mkdtemp(prefix="bench-peers-"))
    plan = Plan(rounds=options.rounds, warm_up_s=WARM_UP_S, check=True)
    if options.quick:
        sys.exit(_quick(plan, logs))
    bench = Bench(plan, logs)
    wanted = [group for group in groups() if not options.only or group.key in options.only]
    taking = [(group, _variants(group)) for group in wanted]
    try:
        _by_turns(bench, taking, time.monotonic() + 60 * options.minutes, logs)
        ours = [_backend("ours").variants(route)[0] for route in OURS]
        all_of = [v for route in OURS for one in _present() for v in _backend(one).variants(route)]
        if not options.only or DESCRIPTORS in options.only:
            bench.descriptors([*ours, *(one for one in all_of if one.name in LOOPS)])
        if not options.only or CONTACT in options.only:
            defaults = [variant for variant in all_of if variant.name in AS_THEY_COME]
            bench.contact([*ours, *defaults], options.rounds)
    finally:
        if options.json:
            data = msgspec.json.encode(bench.record())
            options.json.write_bytes(msgspec.json.format(data))
    print(f"\n{verdict_table(bench.verdicts)}")
    if options.plot:
        drawing.draw(bench.verdicts, options.plot)
    tell(f"what the sides printed: {logs}")
    sys.exit(any(failure.variant in OURS.values() for failure in bench.failures))


def _by_turns(
    bench: Bench, taking: list[tuple[Group, list[Variant]]], end: float, logs: Path
) -> None:
    """All groups; those of one route and about one size share their processes."""
    left = sorted(taking, key=lambda each: _place(each[0]))
    for _, each in itertools.groupby(left.copy(), key=lambda each: _place(each[0])):
        sharing = list(each)
        with Pairs(max(group.buffer_bytes for group, _ in sharing), logs) as pairs:
            for group, variants in sharing:
                weights = [_weight(*one) for one in left]
                limit_s = (end - time.monotonic()) * weights[0] / sum(weights)
                bench.group(group, variants, pairs, limit_s)
                left.pop(0)
    order = [group.title for group, _ in taking]
    bench.verdicts.sort(key=lambda verdict: order.index(verdict.row))


def _place(group: Group) -> tuple[Route, bool]:
    return group.route, group.buffer_bytes < SMALL


def _quick(plan: Plan, logs: Path) -> int:
    """Do the tools work, and is the coarse ratio the right way round?"""
    group = quick()
    bench = Bench(
        msgspec.structs.replace(plan, rounds=3, at_most=3, retakes=0, warm_up_s=0.1), logs
    )
    with Pairs(group.buffer_bytes, logs) as pairs:
        bench.group(group, _variants(group), pairs, limit_s=40.0)
    print(f"\n{verdict_table(bench.verdicts)}")
    return 0 if all(verdict.met for verdict in bench.verdicts) else 1


def _variants(group: Group) -> list[Variant]:
    """All that take part; a peer that is not installed is said and left out."""
    found = []
    for name in group.backends:
        backend = _backend(name)
        if reason := backend.missing():
            tell(f"left out: {reason}")
            continue
        variants = backend.variants(group.route)
        if name == "ours" and not group.every_ours:
            variants = variants[:1]
        found += [v for v in variants if not group.most or v.name.startswith(group.most)]
    return found


def _present() -> list[str]:
    """Whoever is compared with us, and can be."""
    return [name for name in (*PEERS, *LIMITS.values()) if not _backend(name).missing()]


def _backend(name: str) -> Backend:
    return cast("Backend", importlib.import_module(f"mooncake_connector.bench.backends.{name}"))


def _weight(group: Group, variants: list[Variant]) -> float:
    """Seconds of one round."""
    return len(variants) * len(group.workloads) * (group.turn_s + WARM_UP_S + BESIDE_S)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "kernel": platform.release()}
    found["cores"] = str(len(os.sched_getaffinity(0)))
    for wheel in ("mooncake-connector", *WHEELS):
        try:
            found[wheel] = metadata.version(wheel)
        except metadata.PackageNotFoundError:
            found[wheel] = "not installed"
    return found


def _told(latest: Turn | Failure) -> None:
    if isinstance(latest, Failure):
        tell(f"{latest.workload}: {latest.text.splitlines()[0]}")


def tell(text: str) -> None:
    """To whoever waits."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _options() -> argparse.Namespace:
    keys = [*(group.key for group in groups()), DESCRIPTORS, CONTACT]
    parser = argparse.ArgumentParser(prog="scripts/bench peers", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="valid ones of each variant (5)")
    parser.add_argument("--minutes", type=float, default=30, help="for all rows by turns (30)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every turn there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the ratios: .png or .svg")
    parser.add_argument("--only", default="", metavar="ROW,...", help=f"of: {', '.join(keys)}")
    parser.add_argument(
        "--quick", action="store_true", help="ours against Mooncake, 2048 x 128 KiB, one minute"
    )
    options = parser.parse_args()
    options.only = [key for key in options.only.split(",") if key]
    if unknown := set(options.only) - set(keys):
        parser.error(f"no row {', '.join(sorted(unknown))}; there are {', '.join(keys)}")
    if options.plot:
        drawing.check_can_draw(options.plot)
    return options


if __name__ == "__main__":
    main()
