from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest
from bench_stage import BUFFER, ours_over, scattered

from mooncake_connector.bench.base import Route, Variant
from mooncake_connector.bench.conditions import Condition, workload
from mooncake_connector.bench.percentiles import Latencies
from mooncake_connector.bench.rounds import Pairs, Plan, run_rounds
from mooncake_connector.bench.turns import (
    Failure,
    Outcome,
    Turn,
    bandwidth,
    rotated,
    seconds,
    wanting,
)

if TYPE_CHECKING:
    from pathlib import Path


def turn(variant: str, number: int, p50: float, *, valid: bool = True) -> Turn:
    return Turn(
        variant=variant,
        route=Route.TCP,
        workload="w",
        condition=Condition(),
        round=number,
        run_bytes=10**9,
        threads=1,
        latencies=Latencies(count=1, mean=p50, least=p50, p50=p50, p99=p50, p999=p50),
        wall_s=p50,
        gb_per_s=1 / p50,
        initiator_cpu_s_per_gb=0.1,
        target_cpu_s_per_gb=0.2,
        other_load=0.0 if valid else 1.0,
        valid=valid,
    )


def outcome(*turns: Turn) -> Outcome:
    return Outcome(turns=turns, failures=(), ended="")


def test_medians_are_of_valid_rounds_only() -> None:
    found = outcome(
        turn("a", 0, 1), turn("a", 1, 900, valid=False), turn("a", 2, 2), turn("a", 3, 9)
    )
    assert found.median("a", "w", seconds) == 2
    assert found.valid_rounds("w", "a") == 3
    assert found.median("b", "w", seconds) is None


def test_a_ratio_is_the_median_of_the_rounds_ratios_not_the_ratio_of_medians() -> None:
    ours = [turn("a", 0, 1), turn("a", 1, 10), turn("a", 2, 100)]
    theirs = [turn("b", 0, 4), turn("b", 1, 20), turn("b", 2, 100), turn("b", 3, 1)]
    found = outcome(*ours, *theirs)
    assert found.ratio("b", "a", "w", seconds) == 2  # of 4, 2, 1; medians: 12 / 10
    assert found.ratio("a", "b", "w", bandwidth) == pytest.approx(2)


def test_a_ratio_needs_a_round_in_which_both_are_valid() -> None:
    found = outcome(turn("a", 0, 1), turn("b", 0, 2, valid=False), turn("b", 1, 2))
    assert found.ratio("a", "b", "w", seconds) is None


def test_each_goes_first_in_its_turn() -> None:
    assert [rotated("abc", number)[0] for number in range(4)] == ["a", "b", "c", "a"]
    assert rotated("abc", 1) == ["b", "c", "a"]
    assert rotated([], 3) == []


def test_a_workload_is_wanting_until_all_its_variants_have_enough_rounds() -> None:
    pairs = [("a", "w"), ("b", "w"), ("a", "v")]
    turns = [turn("a", 0, 1), turn("a", 1, 1), turn("b", 0, 1), turn("b", 0, 1)]
    assert wanting(turns, pairs, 2) == {"w": 1, "v": 0}
    assert wanting(turns, pairs[:2], 1) == {}
    assert wanting([turn("a", 0, 1, valid=False)], pairs[:1], 1) == {"w": 0}


def test_variants_take_turns_and_one_that_fails_does_not_stop_the_others(
    tmp_path: Path,
) -> None:
    broken = Variant(
        backend="ours", name="broken", route=Route.TCP, options={"protocol": "loopback"}
    )
    variants = [ours_over(Route.TCP), broken, ours_over(Route.SAME_HOST)]
    read = workload("read", scattered("read", 5))
    tcp_only = workload("tcp only", scattered("write", 5), routes=(Route.TCP,))
    plan = Plan(rounds=2, at_most=1, turn_s=0.01, warm_up_s=0.0, retakes=0, check=True)
    heard: list[Turn | Failure] = []
    with Pairs(BUFFER, tmp_path) as pairs:
        found = run_rounds(pairs, variants, [read, tcp_only], plan, heard.append)
    assert [(f.variant, f.workload) for f in found.failures] == [
        ("broken", "read"),
        ("broken", "tcp only"),
    ]
    assert "cannot open segment" in found.failures[0].text
    assert heard.count(found.failures[0]) == 1
    assert tuple(one for one in heard if isinstance(one, Turn)) == found.turns
    assert [(t.round, t.workload, t.variant) for t in found.turns] == [
        (0, "read", "ours tcp"),
        (0, "read", "ours shm"),
        (0, "tcp only", "ours tcp"),
    ]
    assert found.ended.startswith(
        "1 rounds, no more were asked for; valid rounds there are of read "
    )
    assert msgspec.json.decode(msgspec.json.encode(found), type=Outcome) == found


def test_rounds_go_on_until_there_are_enough_valid_ones_or_time_is_over(tmp_path: Path) -> None:
    variants = [ours_over(Route.TCP), ours_over(Route.SAME_HOST)]
    plan = Plan(rounds=2, limit_s=2.0, turn_s=0.01, warm_up_s=0.0)
    with Pairs(BUFFER, tmp_path) as pairs:
        found = run_rounds(pairs, variants, [workload("read", scattered("read", 1))], plan)
    valid = [found.valid_rounds("read", variant.name) for variant in variants]
    if found.ended == "2 valid rounds of each":
        assert min(valid) == 2  # who has enough goes on beside who has not
    else:  # a busy machine
        assert found.ended == f"the limit of 2 s; valid rounds there are of read {min(valid)}"
    firsts = {t.round: t.variant for t in reversed(found.turns)}
    assert all(name == variants[number % 2].name for number, name in firsts.items())


def test_no_more_pairs_stay_open_than_fit_into_memory(tmp_path: Path) -> None:
    with Pairs(BUFFER, tmp_path) as pairs:
        pairs._most = 1
        for variant in (ours_over(Route.TCP), ours_over(Route.SAME_HOST)):
            with pairs.running(variant) as pair:
                pair.connect()
            assert list(pairs._open) == [variant.name]
