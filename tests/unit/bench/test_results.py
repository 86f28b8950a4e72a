from __future__ import annotations

import pytest

from mooncake_connector.bench.base import Route, Variant
from mooncake_connector.bench.conditions import Condition
from mooncake_connector.bench.lineup import Lineup
from mooncake_connector.bench.percentiles import Latencies
from mooncake_connector.bench.results import blank_lines, filled
from mooncake_connector.bench.sweep import Row
from mooncake_connector.bench.turns import Failure, Outcome, Turn
from mooncake_connector.bench.workloads import Case


def variant(name: str, *, is_limit: bool = False) -> Variant:
    return Variant(backend=name, name=name, route=Route.TCP, is_limit=is_limit)


LINEUP = Lineup(
    variant("ours"),
    (variant("one stream", is_limit=True), variant("two streams", is_limit=True)),
    (variant("peer"),),
    "",
)
CASE = Case("sweep", Row(4096, 16, 2), ())
BLANKS = blank_lines(CASE, "read", LINEUP)


def turn(name: str, gb_per_s: float, number: int = 0, *, valid: bool = True) -> Turn:
    return Turn(
        variant=name,
        route=Route.TCP,
        workload="row",
        condition=Condition(),
        round=number,
        run_bytes=65536,
        threads=2,
        latencies=Latencies(count=100, mean=2e-3, least=1e-3, p50=1.9e-3, p99=3e-3, p999=4e-3),
        wall_s=0.5,
        gb_per_s=gb_per_s,
        initiator_cpu_s_per_gb=0.2,
        target_cpu_s_per_gb=0.3,
        other_load=0.0,
        valid=valid,
    )


def outcome(*turns: Turn, failures: tuple[Failure, ...] = ()) -> Outcome:
    return Outcome(turns=turns, failures=failures, ended="")


def test_of_the_limits_the_best_is_shown_and_all_are_measured_against_it() -> None:
    turns = [turn("ours", 3.0), turn("peer", 1.5), turn("one stream", 2.0), turn("two streams", 4)]
    lines = {line.variant: line for line in filled(BLANKS, "row", outcome(*turns), LINEUP)}
    assert list(lines) == ["ours", "peer", "two streams"]
    figures = [line.figures for line in lines.values()]
    assert [one and one.of_limit for one in figures] == [0.75, 0.375, 1.0]
    assert [one and one.ours_over_it for one in figures] == [None, 2.0, None]


def test_the_time_between_runs_counts_the_threads_that_ran_at_once() -> None:
    ours = filled(BLANKS, "row", outcome(turn("ours", 1.0)), LINEUP)[0].figures
    assert ours is not None
    assert ours.between == pytest.approx(0.5 * 2 / 100)


def test_turns_beside_other_work_do_not_count_while_there_are_better_ones() -> None:
    turns = [turn("ours", 1.0, 0), turn("ours", 9.0, 1, valid=False)]
    ours = filled(BLANKS, "row", outcome(*turns), LINEUP)[0].figures
    assert ours is not None
    assert (ours.bandwidth, ours.valid, ours.rounds) == (1.0, 1, 2)


def test_without_a_valid_turn_all_are_shown_and_none_is_called_valid() -> None:
    turns = [turn("ours", 1.0, valid=False), turn("two streams", 2.0, valid=False)]
    ours = filled(BLANKS, "row", outcome(*turns), LINEUP)[0].figures
    assert ours is not None
    assert (ours.of_limit, ours.valid, ours.rounds) == (0.5, 0, 1)


def test_a_variant_that_failed_has_the_first_line_of_its_reason() -> None:
    failure = Failure(variant="peer", workload="row", text="peer: cannot\nits log")
    lines = filled(BLANKS, "row", outcome(turn("ours", 1.0), failures=(failure,)), LINEUP)
    assert [(line.variant, line.note) for line in lines] == [("ours", ""), ("peer", "peer: cannot")]


def test_a_skipped_row_is_one_line() -> None:
    skipped = Case("sweep", Row(4096, 16, 2, "needs 2 of 1 bytes"), ())
    (line,) = blank_lines(skipped, "read", LINEUP)
    assert (line.variant, line.note) == ("", "skipped: needs 2 of 1 bytes")
