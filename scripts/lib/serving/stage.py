"""Opens a group of set-ups and lets them take turns: single requests first, then the load."""

from __future__ import annotations

import contextlib
import itertools
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from harness.completions import CompletionFailed, token_prompt
from harness.process import ServerFailed

from mooncake_connector.bench import load as machine
from serving.results import Handed, Round, Row
from serving.setup import SetupFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from harness.completions import Reply

    from serving.setup import Hand, Load, Place, Running, Setup

WARM_TOKENS = 512
TOKENS = 9  # of a single request: eight steps to take the mean of
Failures = (CompletionFailed, ServerFailed, OSError)


@dataclass(frozen=True)
class Plan:
    """How much to measure.

    Attributes:
        rounds: At most; one at least.
        prompts: Lengths of the single requests.
        repeats: Single requests of each length in a turn.
        load: One turn's; its seed is counted on.
        idle_s: How long to look at a set-up that nobody asks for anything.
    """

    rounds: int
    prompts: tuple[int, ...]
    repeats: int
    load: Load
    idle_s: float = 5.0


def run_group(
    setups: Sequence[Setup],
    plan: Plan,
    place: Place,
    number: int,
    until: float,
    afterwards: Callable[[dict[str, Running]], None],
) -> list[Row]:
    """Open all, measure by turns until `plan.rounds` are done or the next would end after `until`.

    `afterwards` gets what is up, by name, when the rounds are over.

    A set-up that does not open, or whose turn fails, is told of in its row; the others go on.
    """
    rows = {setup.name: _row(setup, number) for setup in setups}
    with contextlib.ExitStack() as stack:
        up: dict[str, Running] = {}
        for setup in setups:
            begin = time.monotonic()
            with place.console.status(f"{setup.name}: starting {setup.servers} servers"):
                logs = place.logs / f"group-{number}" / _file_name(setup.name)
                try:
                    up[setup.name] = stack.enter_context(setup.open(replace(place, logs=logs)))
                except SetupFailed as failed:
                    rows[setup.name].error = str(failed)
                    place.console.print(f"{setup.name} does not start: {failed}", markup=False)
                    continue
            took = time.monotonic() - begin
            rows[setup.name].facts = up[setup.name].facts
            rows[setup.name].idle_cores = _idle_cores(plan)
            up[setup.name].pause()
            place.console.print(f"{setup.name}: up after {took:.0f} s")
        reference = next((s.name for s in setups if s.kind == "aggregated" and s.name in up), "")
        _take_rounds(up, rows, reference, plan, place, until)
        afterwards(up)
        place.console.print("stopping the servers")
    return list(rows.values())


def _idle_cores(plan: Plan) -> float:
    """Of the set-up that is up last; those before it are stopped, or sleep."""
    before = machine.sample()
    time.sleep(plan.idle_s)
    after = machine.sample()
    return (after.ours - before.ours) / (after.at - before.at)


def _take_rounds(
    up: dict[str, Running],
    rows: dict[str, Row],
    reference: str,
    plan: Plan,
    place: Place,
    until: float,
) -> None:
    names = list(up)
    longest = 0.0
    for number in range(1, plan.rounds + 1):
        begin = time.monotonic()
        if number > 1 and begin + longest > until:
            place.console.print(f"no time for round {number}")
            return
        known = _expected(up.get(reference), plan, number)
        # Another one begins each time: whoever follows the reference finds the machine warm.
        for name in names[number % len(names) :] + names[: number % len(names)]:
            with place.console.status(f"round {number} of {plan.rounds}: {name}"):
                taken = _turn(up[name], known, plan, place, number, _file_name(name))
            rows[name].rounds.append(taken)
            if taken.error:
                place.console.print(f"round {number}: {name}: {taken.error}", markup=False)
        longest = max(longest, time.monotonic() - begin)
        place.console.print(f"round {number} of {plan.rounds} took {longest:.0f} s")


class Single(NamedTuple):
    """One single request: its prompt's length, how many came before it, and how it is sent."""

    length: int
    repeat: int
    at_once: bool


def prompts(plan: Plan, number: int) -> dict[Single, list[int]]:
    """Token ids, new in each round and for each style: no prefix cache has seen them."""
    singles = itertools.product(plan.prompts, range(plan.repeats), (False, True))
    return {
        Single(length, repeat, at_once): token_prompt(
            length, seed=((number * 100 + repeat) * 2 + at_once) * 100_000 + length
        )
        for length, repeat, at_once in singles
    }


def _expected(running: Running | None, plan: Plan, number: int) -> dict[Single, Reply]:
    """The aggregated server's answers; nothing when there is none, and then nothing is handed."""
    if running is None:
        return {}
    try:
        running.resume()
        return {key: running.ask(prompt, TOKENS) for key, prompt in prompts(plan, number).items()}
    except Failures:  # its own turn will fail, too, and say so
        return {}
    finally:
        running.pause()


def _turn(
    running: Running,
    known: dict[Single, Reply],
    plan: Plan,
    place: Place,
    number: int,
    name: str,
) -> Round:
    before = machine.sample()
    counted: dict[str, float] = {}
    handed: list[Handed] = []
    figures, error = None, ""
    try:
        running.resume()
        _warm(running, number)
        before, counted = machine.sample(), running.timers()
        for key, prompt in prompts(plan, number).items():
            hand = running.hand_at_once if key.at_once else running.hand
            if hand is not None and key in known:
                handed.append(_handed(hand, prompt, known[key], at_once=key.at_once))
        load = msgspec.structs.replace(plan.load, seed=plan.load.seed + number)
        figures = running.load(load, place.logs / f"{name}-{number}.json")
    except Failures as failed:
        error = f"{type(failed).__name__}: {failed}"
    after = machine.sample()
    with contextlib.suppress(*Failures):
        counted = {key: total - counted.get(key, 0.0) for key, total in running.timers().items()}
    running.pause()
    return Round(
        number=number,
        handed=tuple(handed),
        load=figures,
        error=error,
        other_load=machine.other_load(before, after),
        timers=counted,
    )


def _warm(running: Running, number: int) -> None:
    """One transfer of each style that is not measured: the first after a pause took seconds."""
    for style, hand in enumerate((running.hand, running.hand_at_once)):
        if hand is not None:
            hand(token_prompt(WARM_TOKENS, seed=-2 * number - style), TOKENS)


def _handed(hand: Hand, prompt: list[int], expected: Reply, *, at_once: bool) -> Handed:
    seen = hand(prompt, TOKENS)
    return Handed(
        tokens=len(prompt),
        handover_ms=seen.handover_s(expected.itl_s) * 1e3,
        prefill_ms=(seen.prefill_answered - seen.sent) * 1e3,
        step_ms=expected.itl_s * 1e3,
        equal=seen.tokens == expected.tokens,
        at_once=at_once,
    )


def _row(setup: Setup, group: int) -> Row:
    names = ("name", "framework", "route", "kind", "pairs", "needed")
    return Row(**{name: getattr(setup, name) for name in names}, group=group)


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)
