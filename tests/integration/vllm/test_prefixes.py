"""Pages that a side has already are neither computed nor moved again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from harness.transfers import Transfers
from server_stage import until
from vllm_requests import ask, both_at_once, prefill_first, prefill_leg
from vllm_stage import PAGE, PAGE_BYTES, held_pages, metric

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm_stage import Stage

pytestmark = pytest.mark.integration


def test_only_the_pages_that_decode_lacks_are_moved(
    stage: Stage, prompt: Callable[[int], list[int]]
) -> None:
    shared = prompt(4 * PAGE)
    prefill_first(stage, shared + prompt(20))
    second = shared + prompt(PAGE + 10)
    before = Transfers.of(stage.decode.url)
    assert prefill_first(stage, second) == ask(stage.aggregated, second)
    assert Transfers.of(stage.decode.url).since(before).nbytes == 2 * PAGE_BYTES


@pytest.mark.parametrize("way", [prefill_first, both_at_once])
def test_a_prompt_that_decode_has_whole_moves_nothing_and_frees_prefills_pages(
    stage: Stage, prompt: Callable[[int], list[int]], way: Callable[..., list[list[int]]]
) -> None:
    ids = prompt(4 * PAGE + 1)  # decode computes the last token, so four pages are all it needs
    first = way(stage, ids)
    before = Transfers.of(stage.decode.url)
    assert way(stage, ids) == first == ask(stage.aggregated, ids)
    moved = Transfers.of(stage.decode.url).since(before)
    assert (moved.requests, moved.nbytes) == (0, 0)
    until(lambda: held_pages(stage.prefill) == 0, 10, "prefill is told that nobody will come")


@pytest.mark.parametrize("way", [prefill_first, both_at_once])
def test_pages_that_prefill_had_cached_are_offered_like_computed_ones(
    stage: Stage, prompt: Callable[[int], list[int]], way: Callable[..., list[list[int]]]
) -> None:
    shared = prompt(5 * PAGE)
    ask(stage.prefill, shared)
    ids = shared + prompt(2 * PAGE + 5)
    hits = metric(stage.prefill, "vllm:prefix_cache_hits_total")
    before = Transfers.of(stage.decode.url)
    assert way(stage, ids) == ask(stage.aggregated, ids)
    assert metric(stage.prefill, "vllm:prefix_cache_hits_total") - hits == 5 * PAGE
    assert Transfers.of(stage.decode.url).since(before).nbytes == 8 * PAGE_BYTES


def test_a_page_stays_held_until_decode_comes_for_it(
    stage: Stage, prompt: Callable[[int], list[int]]
) -> None:
    ids = prompt(3 * PAGE)
    params = prefill_leg(stage, ids)
    until(lambda: held_pages(stage.prefill) == 3, 10, "prefill holds the prompt's pages")
    assert ask(stage.decode, ids, kv_transfer_params=params) == ask(stage.aggregated, ids)
    until(lambda: held_pages(stage.prefill) == 0, 10, "they are free after decode read them")
