"""Medians over rounds, and ratios of ours to the peers on the same route. Pure."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

import msgspec

from mooncake_connector.bench.load import is_valid

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from serving.results import Handed, Round, Row

FEWEST_VALID = 3  # rounds; with fewer, the verdict takes all and says so


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the table; milliseconds and tokens a second, nan where nothing was measured.

    Attributes:
        rounds: Whole rounds in the medians.
        valid: Rounds in which other work took no more than 0.2 of a core.
        handover: Prompt tokens -> median over requests, prefill first or as SGLang has it.
        at_once: Ditto, both legs at once.
        equal: Requests whose tokens were the aggregated server's, of `asked`.
    """

    name: str
    output_tokens_s: float
    ttft_mean: float
    ttft_p99: float
    tpot_mean: float
    itl_mean: float
    itl_p99: float
    handover: dict[int, float]
    at_once: dict[int, float]
    equal: int
    asked: int
    rounds: int
    valid: int


class Ratio(msgspec.Struct, frozen=True, kw_only=True):
    """Ours over a peer's: below 1 is better. `wanted`: at most this, None for no target."""

    what: str
    ours: str
    peer: str
    ratio: float
    wanted: float | None = None


def counted(rounds: Sequence[Round]) -> list[Round]:
    """The rounds that decide: whole ones, and valid ones when there are enough of them."""
    whole = [each for each in rounds if not each.error]
    valid = [each for each in whole if is_valid(each.other_load)]
    return valid if len(valid) >= FEWEST_VALID else whole


def summary(row: Row) -> Summary:
    """The medians of a set-up's rounds."""
    rounds = counted(row.rounds)
    loads = [each.load for each in rounds if each.load is not None]
    handed = [one for each in rounds for one in each.handed]
    return Summary(
        name=row.name,
        output_tokens_s=_median([load.output_tokens_s for load in loads]),
        ttft_mean=_median([load.ttft.mean for load in loads]),
        ttft_p99=_median([load.ttft.p99 for load in loads]),
        tpot_mean=_median([load.tpot.mean for load in loads]),
        itl_mean=_median([load.itl.mean for load in loads]),
        itl_p99=_median([load.itl.p99 for load in loads]),
        handover=_handovers([one for one in handed if not one.at_once]),
        at_once=_handovers([one for one in handed if one.at_once]),
        equal=sum(one.equal for one in handed),
        asked=len(handed),
        rounds=len(rounds),
        valid=sum(is_valid(each.other_load) for each in rounds),
    )


def ratios(rows: Sequence[Row]) -> list[Ratio]:
    """Ours against each peer on the same route with as many servers, that took turns with it."""
    found = []
    for ours in (row for row in rows if row.kind == "ours"):
        for peer in (row for row in rows if row.kind == "peer"):
            alike = ("framework", "route", "pairs", "group")
            if all(getattr(ours, name) == getattr(peer, name) for name in alike):
                found += _compared(ours, peer)
    return found


def _compared(ours: Row, peer: Row) -> list[Ratio]:
    mine, theirs = summary(ours), summary(peer)
    figures: dict[str, tuple[Callable[[Summary], float], float | None]] = {
        "mean TTFT": (lambda of: of.ttft_mean, 1.0),
        "P99 ITL": (lambda of: of.itl_p99, 1.0),
    }
    longest = max((*mine.handover, *mine.at_once), default=0)
    # NIXL's twice, Mooncake's three times ours at the longest prompt
    wanted = 1 / 3 if "mooncake" in peer.name.lower() else 1 / 2
    figures[f"handover at {longest}"] = (lambda of: of.handover.get(longest, math.nan), wanted)
    figures[f"handover at {longest}, both legs at once"] = (
        lambda of: of.at_once.get(longest, math.nan),
        wanted,
    )
    compared = [
        Ratio(
            what=what,
            ours=ours.name,
            peer=peer.name,
            ratio=_divided(figure(mine), figure(theirs)),
            wanted=wanted,
        )
        for what, (figure, wanted) in figures.items()
    ]
    return [each for each in compared if not math.isnan(each.ratio)]


def _handovers(handed: Sequence[Handed]) -> dict[int, float]:
    return {
        length: _median([one.handover_ms for one in handed if one.tokens == length])
        for length in sorted({one.tokens for one in handed})
    }


def _divided(ours: float, theirs: float) -> float:
    # A handover near nothing is within the decode step's own spread; no ratio of it means much.
    return ours / theirs if theirs > 0 else math.nan


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else math.nan
