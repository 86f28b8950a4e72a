"""What is concluded from the rounds of `scripts/bench serving`."""

from __future__ import annotations

import io
import math

import msgspec
import pytest
from rich.console import Console
from serving.report import show
from serving.results import Handed, Result, Round, Row
from serving.setup import Load, LoadFigures, Spread
from serving.verdict import ratios, summary

LOAD = Load(requests=4, rate=1.0, input_tokens=2048, output_tokens=8, seed=0)


def round_of(
    number: int, ttft: float, handover: float, *, error: str = "", other: float = 0.0
) -> Round:
    spread = Spread(ttft, ttft, 2 * ttft)
    return Round(
        number=number,
        load=LoadFigures(output_tokens_s=10.0, ttft=spread, tpot=spread, itl=spread),
        handed=(
            Handed(tokens=4096, handover_ms=handover, prefill_ms=1.0, step_ms=1.0, equal=True),
        ),
        error=error,
        other_load=other,
    )


def row_of(name: str, kind: str, rounds: list[Round], route: str = "tcp", group: int = 1) -> Row:
    return Row(
        name=name, framework="vllm", route=route, kind=kind, pairs=1, rounds=rounds, group=group
    )


def test_a_turn_that_failed_is_in_no_median() -> None:
    row = row_of(
        "ours",
        "ours",
        [round_of(1, 10, 5), round_of(2, 900, 900, error="died"), round_of(3, 20, 7)],
    )
    assert summary(row).ttft_mean == 15
    assert summary(row).handover == {4096: 6}


def test_rounds_of_a_busy_machine_do_not_count_when_three_others_do() -> None:
    quiet = [round_of(number, 10, 5) for number in (1, 2, 3)]
    row = row_of("ours", "ours", [*quiet, round_of(4, 900, 900, other=0.5)])
    assert (summary(row).ttft_mean, summary(row).rounds, summary(row).valid) == (10, 3, 3)
    few = row_of("ours", "ours", [quiet[0], round_of(2, 30, 5, other=0.5)])
    assert (summary(few).ttft_mean, summary(few).rounds, summary(few).valid) == (20, 2, 1)


def test_ours_is_compared_with_peers_of_its_route_and_group_only() -> None:
    rows = [
        row_of("ours", "ours", [round_of(1, 10, 10)]),
        row_of("NIXL", "peer", [round_of(1, 20, 40)]),
        row_of("elsewhere", "peer", [round_of(1, 1, 1)], route="same host"),
        row_of("later", "peer", [round_of(1, 1, 1)], group=2),
        row_of("aggregated", "aggregated", [round_of(1, 1, 1)], route=""),
    ]
    found = {each.what: each for each in ratios(rows)}
    assert {each.peer for each in found.values()} == {"NIXL"}
    assert found["handover at 4096"].ratio == 0.25
    assert found["mean TTFT"].ratio == 0.5


@pytest.mark.parametrize(("peer", "wanted"), [("NIXL, default", 1 / 2), ("Mooncake, tcp", 1 / 3)])
def test_the_handover_wanted_is_half_of_nixls_and_a_third_of_mooncakes(
    peer: str, wanted: float
) -> None:
    rows = [row_of("ours", "ours", [round_of(1, 1, 1)]), row_of(peer, "peer", [round_of(1, 1, 9)])]
    assert [each.wanted for each in ratios(rows) if "handover" in each.what] == [wanted]


def test_a_handover_within_the_decode_steps_spread_gives_no_ratio() -> None:
    rows = [
        row_of("ours", "ours", [round_of(1, 1, 1)]),
        row_of("NIXL", "peer", [round_of(1, 1, -1)]),
    ]
    assert not [each for each in ratios(rows) if "handover" in each.what]


def test_handovers_are_compared_within_one_style() -> None:
    def once(handover: float, *, at_once: bool) -> Round:
        handed = round_of(1, 1, handover).handed
        changed = tuple(msgspec.structs.replace(one, at_once=at_once) for one in handed)
        return msgspec.structs.replace(round_of(1, 1, handover), handed=changed)

    ours = row_of("ours", "ours", [once(30, at_once=False), once(2, at_once=True)])
    mooncake = row_of("Mooncake", "peer", [once(10, at_once=True)])
    found = {each.what: each.ratio for each in ratios([ours, mooncake]) if "hand" in each.what}
    assert found == {"handover at 4096, both legs at once": pytest.approx(0.2)}


def test_a_set_up_without_rounds_has_no_figures() -> None:
    nothing = summary(row_of("NIXL", "peer", []))
    assert math.isnan(nothing.ttft_mean)
    assert nothing.handover == {}


def test_the_result_goes_through_json_and_says_what_did_not_start() -> None:
    failed = row_of("Mooncake, tcp", "peer", [])
    failed.error = "RuntimeError: no accelerator"
    result = Result(
        machine={},
        versions={},
        load=LOAD,
        prompts=(4096,),
        rows=[row_of("ours", "ours", [round_of(1, 12.34, 5)]), failed],
    )
    again = msgspec.json.decode(msgspec.json.encode(result), type=Result)
    text = io.StringIO()
    show(again, Console(file=text, width=200))
    assert "Mooncake, tcp was not measured: RuntimeError: no accelerator" in text.getvalue()
    assert "12.3 / 24.7" in text.getvalue()
