"""Legs that do not belong together, or that SGLang cannot serve: refused, and never mixed up."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from harness.servers import HOST, free_port
from harness.sglang import POOL_TOKENS
from server_stage import IDLE_S, REPLY_S, until
from sglang_requests import ask, both, meeting, moved, refusal, send
from sglang_stage import load

if TYPE_CHECKING:
    from collections.abc import Callable

    from sglang_stage import Stage

pytestmark = pytest.mark.integration

#: What is refused at once is so within a scheduler step and one look-up.
AT_ONCE_S = 5.0


def test_a_prompt_other_than_the_prefilled_one_is_refused_and_the_right_one_still_served(
    stage: Stage, prompt: Callable[[int], list[int]]
) -> None:
    ids, where = prompt(200), meeting(stage)
    with ThreadPoolExecutor(1) as threads:
        prefilled = threads.submit(send, stage.prefill, ids, **where)
        said = refusal(stage.decode, prompt(200), **where)
        assert said.status == 500
        assert "prompt key" in str(said)
        assert ask(stage.decode, ids, **where) == ask(stage.aggregated, ids)
        prefilled.result(REPLY_S)


def test_a_room_serves_one_request_after_another(
    stage: Stage, prompt: Callable[[int], list[int]]
) -> None:
    room = stage.room()
    for length in (130, 65, 1):
        ids = prompt(length)
        assert both(stage, ids, room) == ask(stage.aggregated, ids)


def test_of_two_requests_in_one_room_at_once_the_first_is_served_and_the_other_refused(
    stage: Stage, prompt: Callable[[int], list[int]]
) -> None:
    ids, others = prompt(300), prompt(200)
    where = meeting(stage)
    with ThreadPoolExecutor(2) as threads:
        prefilled = threads.submit(send, stage.prefill, ids, **where)
        until(lambda: load(stage.prefill)["bootstrap"] == 1, IDLE_S, "prefill waits for decode")
        began = time.monotonic()
        said = refusal(stage.prefill, others, **where)
        assert time.monotonic() - began < AT_ONCE_S
        assert f"bootstrap_room {where['bootstrap_room']} is another request's" in str(said)
        decoded = threads.submit(ask, stage.decode, ids, **where, **moved(delay_s=0.1))
        until(lambda: load(stage.decode)["transfer"] == 1, IDLE_S, "decode reads")
        said = refusal(stage.decode, others, **where, **moved(delay_s=0.1))
        assert f"bootstrap_room {where['bootstrap_room']} is another request's" in str(said)
        assert decoded.result(REPLY_S) == ask(stage.aggregated, ids)
        prefilled.result(REPLY_S)


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_room_0_is_refused_at_once(
    stage: Stage, prompt: Callable[[int], list[int]], side: str
) -> None:
    """SGLang takes a 0 in a row of metadata for "not yet written": decode would wait for ever."""
    began = time.monotonic()
    said = refusal(getattr(stage, side), prompt(65), **meeting(stage, room=0))
    assert "bootstrap_room 0" in str(said)
    assert time.monotonic() - began < AT_ONCE_S


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_a_request_without_a_room_is_refused_as_sglang_does(
    stage: Stage, prompt: Callable[[int], list[int]], side: str
) -> None:
    said = refusal(getattr(stage, side), prompt(65))
    assert said.status == 400
    assert "without bootstrap room id" in str(said)


def test_a_bootstrap_port_where_nobody_listens_is_named_within_10_s(
    stage: Stage, prompt: Callable[[int], list[int]]
) -> None:
    nobody = free_port()
    began = time.monotonic()
    said = refusal(stage.decode, prompt(65), **meeting(stage) | {"bootstrap_port": nobody})
    assert time.monotonic() - began < 10
    assert said.status == 500
    assert f"{HOST}:{nobody}" in str(said)


def test_a_prompt_that_decode_will_never_have_room_for_is_refused_at_once_by_both_legs(
    stage: Stage, prompt: Callable[[int], list[int]]
) -> None:
    """SGLang's decode admits a request when its prompt and 512 tokens fit, and waits until then."""
    ids = prompt(POOL_TOKENS - 92)
    where = meeting(stage)
    with ThreadPoolExecutor(1) as threads:
        prefilling = threads.submit(refusal, stage.prefill, ids, max_tokens=64, **where)
        began = time.monotonic()
        said = refusal(stage.decode, ids, max_tokens=64, **where)
        assert time.monotonic() - began < AT_ONCE_S
        assert "--num-reserved-decode-tokens" in str(said)
        assert "decode gave it up" in str(prefilling.result(REPLY_S))
        assert time.monotonic() - began < 10


def test_the_router_tells_its_client_that_decode_will_never_have_room(
    stage: Stage, prompt: Callable[[int], list[int]]
) -> None:
    began = time.monotonic()
    said = refusal(stage.router, prompt(POOL_TOKENS - 92), max_tokens=64)
    assert "--num-reserved-decode-tokens" in str(said)
    assert time.monotonic() - began < 10


def test_a_prompt_that_fills_what_decode_may_admit_is_served(
    stage: Stage, prompt: Callable[[int], list[int]]
) -> None:
    ids = prompt(POOL_TOKENS - 512)
    assert both(stage, ids) == ask(stage.aggregated, ids)


def test_two_prompts_in_one_request_each_get_their_own_answer(
    stage: Stage, prompt: Callable[[int], list[int]]
) -> None:
    """The router gives each a room of its own."""
    lists = [prompt(150), prompt(70)]
    answers = send(stage.router, lists)
    assert [one["output_ids"] for one in answers] == [ask(stage.aggregated, ids) for ids in lists]
