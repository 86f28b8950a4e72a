"""Whatever way a request takes, its tokens are the aggregated server's."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from demo_vllm import LENGTHS
from harness.transfers import Transfers
from server_stage import IDLE_S, REPLY_S, until
from vllm_requests import (
    Client,
    ask,
    both_at_once,
    prefill_first,
    prefill_leg,
    send,
    shared_transfer,
    slowed,
)
from vllm_stage import CHUNK, PAGE, PAGE_BYTES, waiting

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness.servers import Server
    from vllm_stage import Stage

pytestmark = pytest.mark.integration

both_paths = pytest.mark.parametrize("path", ["tcp", "shm"])
both_styles = pytest.mark.parametrize("style", ["prefill-first", "both-at-once"])


def pages(tokens: int) -> int:
    """Pages that decode reads for a prompt: it computes the last token itself."""
    return -(-(tokens - 1) // PAGE)


@both_paths
@pytest.mark.parametrize("length", [*LENGTHS, 2, 66, 1000])
def test_a_prompt_gives_the_aggregated_servers_tokens(
    stage: Stage, prompt: Callable[[int], list[int]], length: int, path: str
) -> None:
    ids = prompt(length)
    before = Transfers.of(stage.decode.url)
    assert prefill_first(stage, ids, path) == ask(stage.aggregated, ids)
    moved = Transfers.of(stage.decode.url).since(before)
    assert moved.nbytes == pages(length) * PAGE_BYTES
    assert moved.paths == ({path: 1} if pages(length) else {})


@both_paths
def test_a_prompt_read_while_it_is_computed_gives_the_same_tokens(
    stage: Stage, prompt: Callable[[int], list[int]], path: str
) -> None:
    ids = prompt(7 * CHUNK + 100)
    before = Transfers.of(stage.decode.url)
    for_prefill, for_decode = shared_transfer(stage)
    for_decode |= slowed(path, 0)
    with ThreadPoolExecutor(1) as threads:
        tokens = threads.submit(ask, stage.decode, ids, kv_transfer_params=for_decode)
        until(lambda: waiting(stage.decode) == 1, IDLE_S, "decode waits for the first chunk")
        send(stage.prefill, ids, max_tokens=1, kv_transfer_params=for_prefill)
        assert tokens.result(REPLY_S) == ask(stage.aggregated, ids)
    moved = Transfers.of(stage.decode.url).since(before)
    assert moved.nbytes == pages(len(ids)) * PAGE_BYTES
    assert set(moved.paths) == {path}
    assert moved.paths[path] > 1, "all of it was read in one batch, so nothing overlapped"


@both_styles
@pytest.mark.parametrize("how", ["whole", "streamed"])
@pytest.mark.parametrize("what", ["completion", "chat"])
def test_a_request_through_the_proxy_gives_the_same_tokens(
    stage: Stage,
    proxies: dict[str, Server],
    prompt: Callable[[int], list[int]],
    style: str,
    how: str,
    what: str,
) -> None:
    ids = prompt(300)
    asked: Any = ids
    if what == "chat":
        asked = [{"role": "user", "content": " ".join(map(str, ids[:120]))}]
    before = Transfers.of(stage.decode.url)
    if how == "whole":
        got = ask(proxies[style], asked)
    else:
        with Client(proxies[style], asked, stream=True) as client:
            got = [client.streamed()]
    assert got == ask(stage.aggregated, asked)
    moved = Transfers.of(stage.decode.url).since(before)
    assert moved.requests == 1
    assert moved.nbytes >= 4 * PAGE_BYTES


@both_styles
@both_paths
def test_the_proxy_hands_a_tests_overrides_on(
    stage: Stage,
    proxies: dict[str, Server],
    prompt: Callable[[int], list[int]],
    style: str,
    path: str,
) -> None:
    ids = prompt(200)
    before = Transfers.of(stage.decode.url)
    override = {"test_protocol": path}
    assert ask(proxies[style], ids, kv_transfer_params=override) == ask(stage.aggregated, ids)
    assert set(Transfers.of(stage.decode.url).since(before).paths) == {path}


@pytest.mark.parametrize("way", [prefill_first, both_at_once])
def test_eight_requests_at_once_each_get_their_own_tokens(
    stage: Stage, prompt: Callable[[int], list[int]], way: Callable[..., list[list[int]]]
) -> None:
    prompts = [prompt(length) for length in range(100, 900, 100)]
    expected = [ask(stage.aggregated, ids) for ids in prompts]
    with ThreadPoolExecutor(len(prompts)) as threads:
        asked = [threads.submit(way, stage, ids) for ids in prompts]
        assert [one.result(REPLY_S) for one in asked] == expected


def test_the_last_page_of_a_long_answer_is_right_too(
    stage: Stage, prompt: Callable[[int], list[int]]
) -> None:
    ids = prompt(100)
    long = {"max_tokens": 3 * PAGE}
    params = prefill_leg(stage, ids)
    got = ask(stage.decode, ids, kv_transfer_params=params, **long)
    assert got == ask(stage.aggregated, ids, **long)
