"""What the turns of a group come to: each goal met or missed, and by how much. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from mooncake_connector.bench.turns import Outcome, Turn, cpu, in_place, seconds
from peers.rows import Goal, Group, Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from mooncake_connector.bench.base import Variant


#: See `in_the_running`. Rounds of a quiet machine differ by 1.2 at most: who is behind by more, or
#: is not among so many, will hardly come to be the best.
FAR_BEHIND, KEPT = 1.5, 2
#: Said of a figure from turns beside which the machine was busy, for want of better ones.
NOT_VALID = "no valid round of both: the machine was busy"


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the table.

    Attributes:
        row: Title of the group.
        workload: And of what was run.
        ours: Our figure, in words.
        against: Who it is compared with, and its figure.
        value: What the goal bounds; None: it could not be measured, `note` says why.
        target: The goal in words.
        of_limit: Ours over the machine's limit, where one ran beside it.
        rounds: Behind it: valid ones, of both.
        note: What a reader must know: no valid round, a failure.
    """

    row: str
    workload: str
    ours: str = ""
    against: str = ""
    value: float | None = None
    target: str
    met: bool | None = None
    of_limit: float | None = None
    rounds: int = 0
    note: str = ""


def verdicts(group: Group, outcome: Outcome, limits: Iterable[str]) -> list[Verdict]:
    """One for each goal. `limits` are the variants that are the machine's limit."""
    limits = list(limits)
    every = _with_every_turn(outcome)
    found = []
    for goal in group.goals:
        verdict = _judge(group, goal, outcome, limits)
        if verdict.value is None:
            verdict = _judge(group, goal, every, limits)
            if verdict.value is not None:
                verdict = msgspec.structs.replace(verdict, note=NOT_VALID)
        found.append(verdict)
    return found


def in_the_running(
    group: Group, variants: Sequence[Variant], first: Outcome
) -> set[tuple[str, str]]:
    """(variant, workload) whose further rounds can matter.

    Of those that a goal is against, and of the limits, the `KEPT` best of the first round go on,
    but none that took more than `FAR_BEHIND` times as long as the best. All of ours go on.
    """
    settled = _with_every_turn(first)

    def ahead(names: list[str], workload: str) -> set[tuple[str, str]]:
        known = _medians(settled, workload, names)
        best_first = sorted(known, key=known.__getitem__)[:KEPT]
        return {(n, workload) for n in best_first if known[n] <= FAR_BEHIND * known[best_first[0]]}

    ours = [variant.name for variant in variants if variant.backend == "ours"]
    limits = [variant.name for variant in variants if variant.is_limit]
    fine = set()
    for work in group.workloads:
        fine |= {(name, work.name) for name in _medians(settled, work.name, ours)}
        fine |= ahead(limits, work.name)
    for goal in group.goals:
        for workload in (goal.workload, goal.beside):
            fine |= ahead(_meant(goal, settled), workload)
    return fine


def joined(first: Outcome, then: Outcome) -> Outcome:
    """Both, the second's rounds after the first's."""
    start = 1 + max((turn.round for turn in first.turns), default=-1)
    later = tuple(msgspec.structs.replace(t, round=t.round + start) for t in then.turns)
    return Outcome(
        turns=first.turns + later, failures=first.failures + then.failures, ended=then.ended
    )


def _with_every_turn(outcome: Outcome) -> Outcome:
    """The same, as if all of its turns were valid."""
    turns = tuple(msgspec.structs.replace(turn, valid=True) for turn in outcome.turns)
    return msgspec.structs.replace(outcome, turns=turns)


def _judge(group: Group, goal: Goal, outcome: Outcome, limits: list[str]) -> Verdict:
    at_least = goal.kind in (Kind.FASTER, Kind.IN_PLACE, Kind.DROP)
    sign = ">=" if at_least else "<="
    if goal.kind is Kind.FASTER and goal.bound == 1.0:
        sign = ">"
    blank = Verdict(
        row=group.title, workload=goal.workload, target=f"{sign} {goal.bound:.2f} {goal.kind}"
    )
    ours = outcome.median(goal.ours, goal.workload, seconds)
    if ours is None:
        return msgspec.structs.replace(blank, note=_why(outcome, goal.ours, goal.workload))
    value, against, note = _value(goal, outcome)
    met = None
    if value is not None:
        met = value >= goal.bound if at_least else value <= goal.bound
        if sign == ">":
            met = value > goal.bound
    limit = best(outcome, goal.workload, limits)
    return msgspec.structs.replace(
        blank,
        ours=_ours(goal, outcome),
        against=against,
        value=value,
        met=met,
        of_limit=outcome.ratio(limit, goal.ours, goal.workload, seconds) if limit else None,
        rounds=outcome.valid_rounds(goal.workload, *_compared(goal, outcome)),
        note=note,
    )


def _value(goal: Goal, outcome: Outcome) -> tuple[float | None, str, str]:
    """The number, who it is against, and a note when there is no number."""
    match goal.kind:
        case Kind.CPU:
            return outcome.median(goal.ours, goal.workload, cpu), "", ""
        case Kind.P50 | Kind.P99:
            return _loaded(goal, outcome)
        case Kind.DROP:
            return _drop(goal, outcome)
        case Kind.FASTER | Kind.IN_PLACE:
            _, *rivals = _compared(goal, outcome)
            if not rivals:
                return None, "", _why(outcome, " or ".join(goal.against), goal.workload)
            rival = rivals[0]
            took = in_place if goal.kind is Kind.IN_PLACE else seconds
            ratio = outcome.ratio(rival, goal.ours, goal.workload, took)
            shown = f"{rival} {_figure(outcome, rival, goal.workload, took)}"
            return ratio, shown, "" if ratio else "no round in which both are valid"


def _loaded(goal: Goal, outcome: Outcome) -> tuple[float | None, str, str]:
    """What the load beside does to ours; and to whom the goal is against, which judges nothing."""
    part = seconds if goal.kind is Kind.P50 else _p99

    def times(variant: str) -> float | None:
        quiet = outcome.median(variant, goal.beside, seconds)
        busy = outcome.median(variant, goal.workload, part)
        return busy / quiet if quiet and busy else None

    quiet = outcome.median(goal.ours, goal.beside, seconds)
    value, rival = times(goal.ours), best(outcome, goal.workload, _meant(goal, outcome))
    if quiet is None or value is None:
        return None, "", f"no turn of {goal.beside}"
    theirs = times(rival) if rival else None
    beside = f"; {rival} {theirs:.2f}" if theirs else ""
    return value, f"quiet {_time(quiet)}{beside}", ""


def _compared(goal: Goal, outcome: Outcome) -> list[str]:
    """Ours, and the best of those that it is to be faster than."""
    if goal.kind not in (Kind.FASTER, Kind.IN_PLACE):
        return [goal.ours]
    rival = best(outcome, goal.workload, _meant(goal, outcome))
    return [goal.ours, *([rival] if rival else [])]


def _drop(goal: Goal, outcome: Outcome) -> tuple[float | None, str, str]:
    """How much of its speed in long runs each keeps in short ones: ours over the rival's."""
    rivals = [best(outcome, work, _meant(goal, outcome)) for work in (goal.workload, goal.beside)]
    kept = []
    for short, long in ((goal.ours, goal.ours), tuple(rivals)):
        slow = outcome.median(short, goal.workload, seconds)
        fast = outcome.median(long, goal.beside, seconds)
        if slow is None or fast is None:
            return None, "", f"no turn of {goal.beside}"
        kept.append(fast / slow)
    return kept[0] / kept[1], f"{rivals[0]} keeps {kept[1]:.2f}, ours {kept[0]:.2f}", ""


def _meant(goal: Goal, outcome: Outcome) -> list[str]:
    names = dict.fromkeys(turn.variant for turn in outcome.turns)
    return [
        name
        for name in names
        if name.startswith(goal.against) and not (goal.without and goal.without in name)
    ]


def best(outcome: Outcome, workload: str, names: Iterable[str]) -> str:
    """Of these variants the one with the least median; empty: none has a turn.

    One that was left behind after the first round does not win by that round.
    """
    found = _medians(outcome, workload, names)
    rounds = {name: outcome.valid_rounds(workload, name) for name in found}
    most = max(rounds.values(), default=0)
    return min((n for n in found if 2 * rounds[n] > most), key=found.__getitem__, default="")


def _medians(outcome: Outcome, workload: str, names: Iterable[str]) -> dict[str, float]:
    """Seconds by variant; those without a turn are left out."""
    medians = {name: outcome.median(name, workload, seconds) for name in names}
    return {name: median for name, median in medians.items() if median is not None}


def _why(outcome: Outcome, variant: str, workload: str) -> str:
    """Why there is no figure."""
    for failure in outcome.failures:
        if failure.workload == workload and failure.variant.startswith(variant):
            return f"{failure.variant} failed: {failure.text.splitlines()[0]}"
    return f"{variant} had no turn"


def _p99(turn: Turn) -> float:
    return turn.latencies.p99


def _ours(goal: Goal, outcome: Outcome) -> str:
    settings = goal.ours.partition(", ")[1:]
    if goal.kind is not Kind.IN_PLACE:
        return "".join([_figure(outcome, goal.ours, goal.workload), *settings])
    known = outcome.median(goal.ours, goal.workload, seconds)
    assert known is not None, "only of variants that have turns"
    figure = _figure(outcome, goal.ours, goal.workload, in_place)
    return "".join([figure, *settings, f"; its caller goes on after {_time(known)}"])


def _figure(
    outcome: Outcome, variant: str, workload: str, value: Callable[[Turn], float] = seconds
) -> str:
    """GB/s of a large run, else its time."""
    took = outcome.median(variant, workload, value)
    assert took is not None, "only of variants that have turns"
    size = next(turn.run_bytes for turn in outcome.turns if turn.workload == workload)
    return f"{size / took / 1e9:.2f} GB/s" if size >= 1 << 20 else _time(took)


def _time(took: float) -> str:
    return f"{took * 1e6:.0f} us" if took < 0.01 else f"{took * 1e3:.1f} ms"
