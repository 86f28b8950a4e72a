"""Turns of set-ups: whose requests come when, and what a failure costs the others."""

from __future__ import annotations

import contextlib
import io
import math
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from harness.completions import CompletionFailed, Reply
from rich.console import Console
from serving import stage, vllm_load, vllm_timers
from serving.setup import (
    Exchange,
    Load,
    LoadFigures,
    Place,
    Running,
    Setup,
    SetupFailed,
    Spread,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

LOAD = Load(requests=1, rate=1.0, input_tokens=8, output_tokens=2, seed=10)
PLAN = stage.Plan(rounds=3, prompts=(4, 8), repeats=2, load=LOAD, idle_s=0.0)
SPREAD = Spread(1.0, 1.0, 1.0)


class Script:
    """What the set-ups of a test did, in order; `broken` names those whose load fails."""

    def __init__(self, broken: str = "") -> None:
        self.did: list[tuple[str, Any]] = []
        self.broken = broken

    @contextlib.contextmanager
    def open(self, name: str, _place: Place) -> Iterator[Running]:
        if name == "absent":
            raise SetupFailed("there is no such wheel")
        self.did.append(("open", name))

        def load(wanted: Load, _result: Path) -> LoadFigures:
            self.did.append((name, wanted.seed))
            if name == self.broken:
                raise CompletionFailed(500, "died")
            return LoadFigures(output_tokens_s=1, ttft=SPREAD, tpot=SPREAD, itl=SPREAD)

        def hand(prompt: list[int], _tokens: int) -> Exchange:
            self.did.append((name, tuple(prompt)))
            return Exchange(sent=0, prefill_answered=1, first_token=1.5, tokens=(prompt[0],))

        yield Running(
            url="",
            ask=lambda prompt, _tokens: Reply((prompt[0],), 0.1, 0.25, "length"),
            hand=None if name == "aggregated" else hand,
            load=load,
            timers=lambda: {"requests": float(len(self.did))},
            pause=lambda: self.did.append(("pause", name)),
            resume=lambda: self.did.append(("resume", name)),
        )
        self.did.append(("close", name))

    def run(self, *names: str, plan: stage.Plan = PLAN, until: float = math.inf) -> dict[str, Any]:
        setups = [
            Setup(
                name=name,
                framework="vllm",
                route="",
                kind="aggregated" if name == "aggregated" else "ours",
                servers=1,
                open=partial(self.open, name),
            )
            for name in names
        ]
        place = Place(Path(), Path(), Console(file=io.StringIO()))
        rows = stage.run_group(setups, plan, place, 1, until, lambda _up: None)
        return {row.name: row for row in rows}


def test_all_take_a_turn_in_each_round_and_another_one_begins_each_time() -> None:
    script = Script()
    script.run("aggregated", "a", "b")
    turns = [
        (name, what)
        for name, what in script.did
        if name in "aggregated b" and isinstance(what, int)
    ]
    by_round = [[name for name, seed in turns if seed == LOAD.seed + n] for n in (1, 2, 3)]
    assert all(sorted(names) == ["a", "aggregated", "b"] for names in by_round)
    assert len({names[0] for names in by_round}) == 3


def test_every_request_of_a_set_up_is_a_prompt_that_its_cache_has_not_seen() -> None:
    script = Script()
    script.run("aggregated", "a", "b")
    for name in "ab":
        sent = [what for who, what in script.did if who == name and isinstance(what, tuple)]
        measured = [what for what in sent if len(what) in PLAN.prompts]
        assert len(measured) == PLAN.rounds * PLAN.repeats * len(PLAN.prompts)
        assert len(sent) == len(set(sent)) == len(measured) + PLAN.rounds  # and one to warm up


def test_the_handover_is_less_one_step_of_the_aggregated_server() -> None:
    (first, *_), *_ = [each.handed for each in Script().run("aggregated", "a")["a"].rounds]
    assert first.handover_ms == pytest.approx(500 - 250)
    assert first.equal


def test_a_set_up_that_does_not_open_is_told_of_and_the_others_go_on() -> None:
    rows = Script().run("aggregated", "absent", "a")
    assert rows["absent"].error == "there is no such wheel"
    assert len(rows["a"].rounds) == PLAN.rounds


def test_a_turn_that_fails_is_told_of_and_the_others_go_on() -> None:
    rows = Script(broken="a").run("aggregated", "a", "b")
    assert all("died" in each.error for each in rows["a"].rounds)
    assert all(not each.error for each in rows["b"].rounds)


def test_one_round_is_taken_when_the_time_is_already_over() -> None:
    rows = Script().run("aggregated", "a", until=time.monotonic() - 1)
    assert len(rows["a"].rounds) == 1


def test_a_set_up_runs_only_in_its_turn() -> None:
    script = Script()
    script.run("aggregated", "a", "b")
    running: set[str] = set()
    for who, what in script.did:
        if who == "resume":
            assert not running
            running.add(what)
        elif who == "pause":
            running.discard(what)
        elif who in "ab":
            assert running == {who}


def test_the_result_of_vllm_bench_serve_is_read_by_its_own_names() -> None:
    said = {"output_throughput": 5.0, "completed": 1}
    for kind, base in (("ttft", 10.0), ("tpot", 20.0), ("itl", 30.0)):
        said |= {f"mean_{kind}_ms": base, f"p50_{kind}_ms": base + 1, f"p99_{kind}_ms": base + 2}
    figures = vllm_load.figures(said)
    assert figures.itl == Spread(30.0, 31.0, 32.0)
    command = vllm_load.command("http://a", "folder", LOAD, Path("x/y.json"), "tiny")
    assert command[command.index("--request-rate") + 1] == "1.0"


def test_nixls_counts_are_summed_over_engines() -> None:
    text = "".join(
        f'vllm:nixl_xfer_time_seconds_{what}{{engine="{engine}"}} {value}\n'
        for engine in (0, 1)
        for what, value in (("sum", 0.5), ("count", 2))
    )
    kind = "# TYPE vllm:nixl_xfer_time_seconds histogram\n"
    totals = vllm_timers.nixl_totals(kind + text)
    assert (totals["seconds"], totals["batches"], totals["bytes"]) == (1.0, 4.0, 0.0)


def test_mooncakes_counts_are_its_log_lines_means_times_their_numbers() -> None:
    line = (
        "KV Transfer metrics: Num successful transfers=4, Avg xfer time (ms)=50.0, "
        "P90 xfer time (ms)=60.0, Avg MB per transfer=2.0, Throughput (MB/s)=40.0"
    )
    totals = vllm_timers.mooncake_totals(f"{line}\nother\n{line}\n")
    assert totals == {"batches": 8.0, "seconds": pytest.approx(0.4), "bytes": 16.0 * 2**20}
