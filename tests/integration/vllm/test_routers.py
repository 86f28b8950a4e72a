"""The real vllm-router, unchanged, in front of the pair; `docs/routers.md` says what it sends."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from harness.servers import HOST, Server, free_port
from harness.transfers import Transfers
from server_stage import REPLY_S
from vllm_requests import Client, ask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vllm_stage import Stage

pytestmark = pytest.mark.integration


@pytest.fixture(params=["nixl", "mooncake"])
def router(stage: Stage, request: pytest.FixtureRequest) -> Iterator[Server]:
    mode = request.param
    port = free_port()
    bootstrap = [str(stage.bootstrap_port)] if mode == "mooncake" else []
    command = [
        str(Path(sys.executable).with_name("vllm-router")),
        *("--vllm-pd-disaggregation", "--kv-connector", mode),
        *("--host", HOST, "--port", str(port), "--prometheus-port", str(free_port())),
        *("--prefill", stage.prefill.url, *bootstrap, "--decode", stage.decode.url),
    ]
    with stage.servers.start(f"router-{mode}", port, command) as started:
        started.wait_ready()
        yield started


def test_vllm_router_gives_the_aggregated_servers_tokens(
    stage: Stage, router: Server, prompt: Callable[[int], list[int]]
) -> None:
    before = Transfers.of(stage.decode.url)
    lengths = (1, 3, 64, 65, 128, 500, 900)
    for length in lengths:
        ids = prompt(length)
        assert ask(router, ids) == ask(stage.aggregated, ids), f"a prompt of {length} tokens"
    moved = Transfers.of(stage.decode.url).since(before)
    assert moved.requests == sum(length > 1 for length in lengths)


def test_vllm_router_streams_and_chats(
    stage: Stage, router: Server, prompt: Callable[[int], list[int]]
) -> None:
    before = Transfers.of(stage.decode.url)
    ids = prompt(260)
    with Client(router, ids, stream=True) as client:
        assert [client.streamed()] == ask(stage.aggregated, ids)
    chat = [{"role": "user", "content": f"pages of keys and values {prompt(40)}"}]
    assert ask(router, chat) == ask(stage.aggregated, chat)
    assert Transfers.of(stage.decode.url).since(before).requests == 2


def test_vllm_router_serves_several_clients_at_once(
    stage: Stage, router: Server, prompt: Callable[[int], list[int]]
) -> None:
    prompts = [prompt(length) for length in (90, 180, 270, 360)]
    expected = [ask(stage.aggregated, ids) for ids in prompts]
    before = Transfers.of(stage.decode.url)
    with ThreadPoolExecutor(len(prompts)) as threads:
        asked = [threads.submit(ask, router, ids) for ids in prompts]
        assert [one.result(REPLY_S) for one in asked] == expected
    assert Transfers.of(stage.decode.url).since(before).requests == len(prompts)


def test_several_prompts_in_one_call_are_right_or_refused_behind_vllm_router(
    stage: Stage, router: Server, prompt: Callable[[int], list[int]]
) -> None:
    """The router hands decode the `kv_transfer_params` of the first prompt for all of them."""
    both = [prompt(150), prompt(170)]
    assert ask(router, both) == [ask(stage.aggregated, ids)[0] for ids in both]
