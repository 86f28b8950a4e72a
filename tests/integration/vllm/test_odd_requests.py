"""Requests that are not one prompt with one answer of a given length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from harness.transfers import Transfers
from vllm_requests import (
    KEEP,
    Client,
    ask,
    both_at_once,
    prefill_first,
    prefill_leg,
    send,
    tokens_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness.servers import Server
    from vllm_stage import Stage

pytestmark = pytest.mark.integration

EOS = 2  # of the tiny model
#: Three answers that differ and are the same every time. vLLM refuses n > 1 when it is greedy, and
#: on a CPU its engine dies of a seed when a prompt is computed in several chunks.
THREE = {"n": 3, "temperature": 1.5, "seed": 7}


@pytest.mark.parametrize("prefills_n", [1, 3])
def test_three_answers_to_one_prompt_need_one_transfer(
    stage: Stage, prompt: Callable[[int], list[int]], prefills_n: int
) -> None:
    """The embedded proxy asks prefill for one answer, vllm-router for as many as the client."""
    ids = prompt(333)
    kept = send(
        stage.prefill,
        ids,
        max_tokens=1,
        n=prefills_n,
        temperature=1,
        top_k=1,
        kv_transfer_params=KEEP,
    )
    before = Transfers.of(stage.decode.url)
    got = ask(stage.decode, ids, kv_transfer_params=kept["kv_transfer_params"], **THREE)
    assert got == ask(stage.aggregated, ids, **THREE)
    assert len({tuple(tokens) for tokens in got}) == 3
    assert Transfers.of(stage.decode.url).since(before).requests == 1


def test_three_answers_through_the_proxy_are_the_aggregated_servers(
    stage: Stage, proxies: dict[str, Server], prompt: Callable[[int], list[int]]
) -> None:
    ids = prompt(150)
    expected = ask(stage.aggregated, ids, **THREE)
    for proxy in proxies.values():
        assert ask(proxy, ids, **THREE) == expected


@pytest.mark.parametrize("way", [prefill_first, both_at_once])
def test_two_prompts_in_one_call_each_get_their_own_answer(
    stage: Stage, prompt: Callable[[int], list[int]], way: Callable[..., list[list[int]]]
) -> None:
    """They share one `kv_transfer_params`, which is the KV of one of them."""
    both = [prompt(150), prompt(170)]
    before = Transfers.of(stage.decode.url)
    got = way(stage, both)
    assert got == [ask(stage.aggregated, ids)[0] for ids in both]
    assert Transfers.of(stage.decode.url).since(before).requests == 1


def test_two_prompts_through_the_proxy_each_get_their_own_answer(
    stage: Stage, proxies: dict[str, Server], prompt: Callable[[int], list[int]]
) -> None:
    both = [prompt(90), prompt(80)]
    assert ask(proxies["prefill-first"], both) == [ask(stage.aggregated, ids)[0] for ids in both]


def test_a_prompt_that_differs_from_the_prefilled_one_is_computed_by_decode(
    stage: Stage, prompt: Callable[[int], list[int]]
) -> None:
    params = prefill_leg(stage, prompt(200))
    other = prompt(200)
    before = Transfers.of(stage.decode.url)
    assert ask(stage.decode, other, kv_transfer_params=params) == ask(stage.aggregated, other)
    assert Transfers.of(stage.decode.url).since(before).requests == 0


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_prompt_shorter_than_a_page_goes_through_the_proxy(
    stage: Stage,
    proxies: dict[str, Server],
    prompt: Callable[[int], list[int]],
    length: int,
) -> None:
    ids = prompt(length)
    for proxy in proxies.values():
        assert ask(proxy, ids) == ask(stage.aggregated, ids)


def test_a_first_token_that_ends_the_text_still_hands_the_kv_over(
    stage: Stage, prompt: Callable[[int], list[int]]
) -> None:
    """Prefill then ends as STOPPED, not as LENGTH_CAPPED."""
    ids = prompt(200)
    ends = {"ignore_eos": False, "logit_bias": {str(EOS): 100}}
    before = Transfers.of(stage.decode.url)
    answers = [prefill_first(stage, ids, **ends), ask(stage.aggregated, ids, **ends)]
    assert answers == [[[EOS]], [[EOS]]]
    assert Transfers.of(stage.decode.url).since(before).requests == 1


def test_a_stop_string_ends_both_answers_at_the_same_place(
    stage: Stage, prompt: Callable[[int], list[int]]
) -> None:
    ids = prompt(140)
    text = send(stage.aggregated, ids, max_tokens=48)["choices"][0]["text"]
    letter = next(c for c in text[len(text) // 2 :] if c.isascii() and c.isalnum())
    ends = {"max_tokens": 48, "stop": [letter]}
    params = prefill_leg(stage, ids, **ends)
    here = send(stage.aggregated, ids, **ends)["choices"][0]
    there = send(stage.decode, ids, kv_transfer_params=params, **ends)["choices"][0]
    assert here["finish_reason"] == "stop"
    for said in ("text", "finish_reason", "stop_reason", "token_ids"):
        assert there[said] == here[said]


def test_logprobs_are_the_aggregated_servers(
    stage: Stage, prompt: Callable[[int], list[int]]
) -> None:
    """The one test that asks for them: a server compiles for half a minute at first use."""
    ids = prompt(130)
    params = prefill_leg(stage, ids)
    wanted: dict[str, Any] = {"max_tokens": 4, "logprobs": 2}
    there = send(stage.decode, ids, kv_transfer_params=params, **wanted)
    here = send(stage.aggregated, ids, **wanted)
    assert tokens_of(there) == tokens_of(here)
    ours, theirs = (answer["choices"][0]["logprobs"] for answer in (there, here))
    assert ours["tokens"] == theirs["tokens"]
    assert ours["token_logprobs"] == pytest.approx(theirs["token_logprobs"], abs=1e-3)


def test_a_streamed_answer_reports_how_many_tokens_it_used(
    proxies: dict[str, Server], prompt: Callable[[int], list[int]]
) -> None:
    ids = prompt(100)
    options = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 5}
    with Client(proxies["prefill-first"], ids, **options) as client:
        usage = [event["usage"] for event in client.events() if event.get("usage")]
    assert [(u["prompt_tokens"], u["completion_tokens"]) for u in usage[-1:]] == [(100, 5)]
