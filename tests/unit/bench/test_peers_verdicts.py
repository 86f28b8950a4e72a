from __future__ import annotations

import pytest
from peers.blocks import KIB, scattered
from peers.rows import Goal, Group, Kind
from peers.table import variant_table, verdict_table
from peers.verdicts import Verdict, in_the_running, joined, verdicts

from mooncake_connector.bench.base import Route, Variant
from mooncake_connector.bench.conditions import Condition, workload
from mooncake_connector.bench.percentiles import Latencies
from mooncake_connector.bench.turns import Failure, Outcome, Turn

WORK = workload("quick work", scattered("read", 4, 4 * KIB))


def turn(variant: str, p50: float, number: int = 0, work: str = WORK.name, **more: object) -> Turn:
    known = {"p99": 2 * p50, "cpu": 0.25, "valid": True} | more
    return Turn(
        variant=variant,
        route=Route.TCP,
        workload=work,
        condition=Condition(),
        round=number,
        run_bytes=256 << 20,
        threads=1,
        latencies=Latencies(
            count=10, mean=p50, least=p50, p50=p50, p99=float(str(known["p99"])), p999=p50
        ),
        wall_s=1.0,
        gb_per_s=1.0,
        initiator_cpu_s_per_gb=float(str(known["cpu"])),
        target_cpu_s_per_gb=float(str(known["cpu"])),
        other_load=0.0,
        valid=bool(known["valid"]),
    )


def row(*goals: Goal) -> Group:
    return Group(key="k", title="row", route=Route.TCP, backends=(), workloads=(WORK,), goals=goals)


def judged(goal: Goal, *turns: Turn, failures: tuple[Failure, ...] = ()) -> Verdict:
    outcome = Outcome(turns=turns, failures=failures, ended="")
    return verdicts(row(goal), outcome, ["C sockets, 1 stream"])[0]


def goal(**more: object) -> Goal:
    import msgspec

    known = {"workload": WORK.name, "ours": "ours tcp", "against": ["NIXL"], "bound": 1.5}
    return msgspec.convert(known | more, Goal)


def test_a_goal_names_the_best_of_the_rivals_and_not_their_average() -> None:
    verdict = judged(
        goal(), turn("ours tcp", 0.1), turn("NIXL tcp", 0.4), turn("NIXL tcp, prepped", 0.16)
    )
    assert verdict.value == pytest.approx(1.6)
    assert verdict.against.startswith("NIXL tcp, prepped ")
    assert verdict.met


def test_a_goal_that_is_missed_says_so() -> None:
    verdict = judged(goal(), turn("ours tcp", 0.1), turn("NIXL tcp", 0.14))
    assert verdict.met is False
    assert "**missed**" in verdict_table([verdict])


def test_a_ratio_is_taken_within_each_round() -> None:
    slow_day = [turn("ours tcp", 0.2, 1), turn("NIXL tcp", 0.4, 1)]
    usual = [turn("ours tcp", 0.1, number) for number in (0, 2)]
    usual += [turn("NIXL tcp", 0.2, number) for number in (0, 2)]
    assert judged(goal(), *slow_day, *usual).value == pytest.approx(2.0)


def test_turns_that_are_not_valid_do_not_count_beside_valid_ones() -> None:
    verdict = judged(
        goal(),
        turn("ours tcp", 0.1),
        turn("NIXL tcp", 0.2),
        turn("ours tcp", 0.01, 1, valid=False),
        turn("NIXL tcp", 0.2, 1, valid=False),
    )
    assert verdict.value == pytest.approx(2.0)
    assert not verdict.note


@pytest.mark.parametrize(("ours", "theirs"), [(False, False), (True, False), (False, True)])
def test_without_a_round_in_which_both_are_valid_the_figure_is_shown_with_a_warning(
    ours: bool, theirs: bool
) -> None:
    turns = turn("ours tcp", 0.1, valid=ours), turn("NIXL tcp", 0.2, valid=theirs)
    verdict = judged(goal(), *turns)
    assert verdict.value == pytest.approx(2.0)
    assert "no valid round" in verdict.note


def test_a_rival_that_failed_leaves_the_goal_unmeasured_and_says_why() -> None:
    failure = Failure(variant="NIXL tcp", workload=WORK.name, text="it fell over\nits log")
    verdict = judged(goal(), turn("ours tcp", 0.1), failures=(failure,))
    assert verdict.met is None
    assert verdict.note == "NIXL tcp failed: it fell over"


def test_faster_than_every_peer_is_missed_when_one_is_as_fast() -> None:
    verdict = judged(goal(bound=1.0), turn("ours tcp", 0.1), turn("NIXL tcp", 0.1))
    assert verdict.met is False


def test_variants_that_a_goal_leaves_out_do_not_count() -> None:
    verdict = judged(
        goal(without="merged"),
        turn("ours tcp", 0.1),
        turn("NIXL tcp", 0.4),
        turn("NIXL tcp, runs merged", 0.2),
    )
    assert verdict.value == pytest.approx(4.0)


def test_cpu_is_that_of_both_sides_and_has_an_upper_bound() -> None:
    verdict = judged(goal(kind="CPU s/GB", against=[], bound=0.6), turn("ours tcp", 0.1, cpu=0.35))
    assert verdict.value == pytest.approx(0.7)
    assert verdict.met is False


@pytest.mark.parametrize(("kind", "value"), [(Kind.P50, 2.0), (Kind.P99, 30.0)])
def test_beside_busy_loops_times_are_compared_with_the_quiet_median(
    kind: Kind, value: float
) -> None:
    verdict = judged(
        goal(kind=kind.value, beside="quiet", against=[], bound=20.0),
        turn("ours tcp", 0.1, work="quiet"),
        turn("ours tcp", 0.2, p99=3.0),
    )
    assert verdict.value == pytest.approx(value)
    assert verdict.met == (kind is Kind.P50)


def test_beside_busy_loops_a_loop_in_c_is_shown_and_judges_nothing() -> None:
    ours = turn("ours tcp", 0.1, work="quiet"), turn("ours tcp", 0.2, p99=3.0)
    loop = turn("C sockets, 1 stream", 0.05, work="quiet"), turn("C sockets, 1 stream", 0.1, p99=4)
    given = goal(kind=Kind.P99.value, beside="quiet", against=["C sockets"], bound=20.0)
    verdict = judged(given, *ours, *loop)
    assert verdict.against == "quiet 100.0 ms; C sockets, 1 stream 80.00"
    assert verdict.value == pytest.approx(30.0)
    assert judged(given, *ours).against == "quiet 100.0 ms"


def test_the_drop_compares_what_each_keeps_of_its_speed_in_long_runs() -> None:
    verdict = judged(
        goal(kind=Kind.DROP.value, beside="long", against=["C sockets"], bound=0.9),
        turn("ours tcp", 0.4),
        turn("ours tcp", 0.1, work="long"),
        turn("C sockets, 1 stream", 0.2),
        turn("C sockets, 1 stream", 0.1, work="long"),
    )
    assert verdict.value == pytest.approx(0.5)
    assert verdict.met is False


def test_the_share_of_the_limit_is_shown_beside_a_ratio_to_a_peer() -> None:
    verdict = judged(
        goal(), turn("ours tcp", 0.1), turn("NIXL tcp", 0.2), turn("C sockets, 1 stream", 0.08)
    )
    assert verdict.of_limit == pytest.approx(0.8)
    assert "| 80 " in verdict_table([verdict])


def test_the_variants_table_has_the_fastest_first_and_those_that_failed() -> None:
    failure = Failure(variant="gloo", workload=WORK.name, text="it fell over")
    turns = (turn("ours tcp", 0.1), turn("NIXL tcp", 0.05))
    lines = variant_table(WORK, Outcome(turns=turns, failures=(failure,), ended="")).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["NIXL tcp", "ours tcp", "gloo"]
    assert len({len(line) for line in lines}) == 1  # aligned


def test_further_rounds_are_for_ours_and_the_best_rivals_of_each_goal() -> None:
    first = Outcome(
        turns=tuple(
            turn(name, seconds)
            for name, seconds in {
                "ours tcp": 9.0,
                "NIXL tcp": 5.0,
                "NIXL tcp, prepped": 1.0,
                "NIXL tcp, prepped and posted again": 1.1,
                "NIXL tcp, no progress thread": 1.2,
                "Mooncake tcp": 6.0,
                "Mooncake tcp, pool": 3.0,
                "gloo": 0.1,
                "C sockets, 2 streams": 1.0,
                "C sockets, 4 streams": 1.6,
            }.items()
        ),
        failures=(),
        ended="",
    )
    variants = [
        Variant(
            backend=name[:4].strip(), name=name, route=Route.TCP, is_limit=name.startswith("C ")
        )
        for name in dict.fromkeys(turn.variant for turn in first.turns)
    ]
    running = in_the_running(row(goal(), goal(against=["Mooncake"])), variants, first)
    assert running == {
        (name, WORK.name)
        for name in (
            "ours tcp",
            "NIXL tcp, prepped",
            "NIXL tcp, prepped and posted again",
            "Mooncake tcp, pool",
            "C sockets, 2 streams",
        )
    }


def test_who_is_good_at_one_workload_goes_on_with_that_one() -> None:
    variants = [Variant(backend="nixl", name=n, route=Route.TCP) for n in ("NIXL 1", "NIXL 2")]
    turns = [turn("NIXL 1", 1.0), turn("NIXL 2", 2.0)]
    turns += [turn("NIXL 1", 2.0, work="b"), turn("NIXL 2", 1.0, work="b")]
    first = Outcome(turns=tuple(turns), failures=(), ended="")
    running = in_the_running(row(goal(), goal(workload="b")), variants, first)
    assert running == {("NIXL 1", WORK.name), ("NIXL 2", "b")}


def test_one_that_had_the_first_round_only_is_not_the_best_of_five() -> None:
    verdict = judged(
        goal(),
        turn("NIXL tcp", 0.15),
        *(turn("NIXL tcp, prepped", 0.14 if number == 0 else 0.2, number) for number in range(5)),
        *(turn("ours tcp", 0.1, number) for number in range(5)),
    )
    assert verdict.against.startswith("NIXL tcp, prepped ")
    assert verdict.rounds == 5


def test_later_rounds_are_numbered_after_the_first_ones() -> None:
    first = Outcome(turns=(turn("ours tcp", 0.1), turn("ours tcp", 0.1, 1)), failures=(), ended="")
    then = Outcome(turns=(turn("ours tcp", 0.2),), failures=(), ended="enough")
    both = joined(first, then)
    assert [one.round for one in both.turns] == [0, 1, 2]
    assert both.ended == "enough"
