"""A request that ends early, wherever it is, gives back what it holds on both sides."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from harness.completions import CompletionFailed
from harness.transfers import Transfers
from server_stage import IDLE_S, REPLY_S, until
from vllm_requests import (
    Client,
    ask,
    prefill_first,
    prefill_leg,
    send,
    shared_transfer,
    slowed,
)
from vllm_stage import held_pages, running, waiting

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness.servers import Server
    from vllm_stage import Stage

pytestmark = pytest.mark.integration

#: Per slice of 64 KiB: a page has four, so a page takes seconds and a prompt outlasts any test.
SLOW_S = 5.0


def serves_on(stage: Stage, ids: list[int]) -> None:
    """The pair is at rest, and right about a prompt."""
    stage.idle()
    before = Transfers.of(stage.decode.url)
    assert prefill_first(stage, ids) == ask(stage.aggregated, ids)
    assert Transfers.of(stage.decode.url).since(before).requests == 1


@pytest.mark.parametrize("path", ["tcp", "shm"])
def test_a_client_that_leaves_while_its_kv_is_read_ends_the_reading(
    stage: Stage, prompt: Callable[[int], list[int]], path: str
) -> None:
    ids = prompt(500)
    params = prefill_leg(stage, ids) | slowed(path, SLOW_S)
    with Client(stage.decode, ids, kv_transfer_params=params):
        until(lambda: waiting(stage.decode) == 1, IDLE_S, "the request waits for its KV")
        until(lambda: held_pages(stage.prefill) == 8, IDLE_S, "prefill holds its pages")
    until(lambda: held_pages(stage.prefill) == 0, 10, "prefill's pages are free")
    serves_on(stage, prompt(300))


def test_a_client_that_leaves_before_prefill_was_asked_leaves_nothing_waiting(
    stage: Stage, prompt: Callable[[int], list[int]]
) -> None:
    ids = prompt(300)
    for_prefill, for_decode = shared_transfer(stage)
    with Client(stage.decode, ids, kv_transfer_params=for_decode):
        until(lambda: waiting(stage.decode) == 1, IDLE_S, "decode waits for prefill")
    until(lambda: waiting(stage.decode) == 0, IDLE_S, "decode gave it up")
    # What decode said reached prefill before the request did: its pages are not held for nobody.
    send(stage.prefill, ids, max_tokens=1, kv_transfer_params=for_prefill)
    serves_on(stage, prompt(300))


def test_a_prefill_that_is_aborted_sends_decode_to_compute_it(
    stage: Stage, prompt: Callable[[int], list[int]]
) -> None:
    for _ in range(5):  # prefill may be through before anybody sees that it began
        if left_in_mid_prefill(stage, prompt(1900)):
            break
    else:
        pytest.fail("prefill was through before its client could leave, five times")
    serves_on(stage, prompt(300))


def left_in_mid_prefill(stage: Stage, ids: list[int]) -> bool:
    """Let decode wait for a prefill whose client leaves; the tokens are right in any case."""
    for_prefill, for_decode = shared_transfer(stage)
    options = {"stream": True, "kv_transfer_params": for_decode}
    seen: list[bool] = []

    def begun() -> bool:
        computing = running(stage.prefill) == 1
        if computing or held_pages(stage.prefill) or not waiting(stage.decode):
            seen.append(computing)
        return bool(seen)

    with Client(stage.decode, ids, **options) as decoding:
        until(lambda: waiting(stage.decode) == 1, IDLE_S, "decode waits for prefill")
        with Client(stage.prefill, ids, max_tokens=1, kv_transfer_params=for_prefill):
            until(begun, REPLY_S, "prefill computes")
        got = decoding.streamed()
    assert [got] == ask(stage.aggregated, ids)
    return seen[0]


def test_clients_that_leave_both_legs_leave_nothing_behind(
    stage: Stage, proxies: dict[str, Server], prompt: Callable[[int], list[int]]
) -> None:
    """Prefill is in the midst of the long prompts and through with the short one."""
    slow = {"stream": True, "kv_transfer_params": slowed("", SLOW_S)}
    for length in (1900, 700, 65):
        with Client(proxies["both-at-once"], prompt(length), **slow):
            until(lambda: waiting(stage.decode) == 1, IDLE_S, "decode waits for KV")
        until(lambda: waiting(stage.decode) == 0, IDLE_S, "decode gave it up")
    serves_on(stage, prompt(300))


@pytest.mark.parametrize("style", ["prefill-first", "both-at-once"])
def test_a_client_that_leaves_while_decode_writes_ends_the_answer(
    stage: Stage, proxies: dict[str, Server], prompt: Callable[[int], list[int]], style: str
) -> None:
    with Client(proxies[style], prompt(200), max_tokens=1500, stream=True) as client:
        next(client.events())
        assert running(stage.decode) == 1
    serves_on(stage, prompt(300))


def test_a_request_that_decode_rejects_frees_prefills_pages(
    stage: Stage, prompt: Callable[[int], list[int]]
) -> None:
    """Its API server says 400; the engine never sees the request, only a notice of it."""
    ids = prompt(2000)
    params = prefill_leg(stage, ids)
    until(lambda: held_pages(stage.prefill) == 32, IDLE_S, "prefill holds the prompt's pages")
    with pytest.raises(CompletionFailed, match=r"HTTP 400.*maximum context length"):
        send(stage.decode, ids + prompt(100), kv_transfer_params=params)
    until(lambda: held_pages(stage.prefill) == 0, 10, "prefill's pages are free")
    serves_on(stage, prompt(300))
