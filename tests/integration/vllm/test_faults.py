"""A side that is killed or stopped in mid-transfer, and the other that serves on.

Each test leaves a whole pair: what it killed is started again, each time in another way that the
connector must work in too, and must be found again.
"""

from __future__ import annotations

import http
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from harness.completions import CompletionFailed
from harness.transfers import Transfers
from server_stage import IDLE_S, REPLY_S, until
from vllm_requests import Client, ask, prefill_first, prefill_leg, send, slowed
from vllm_stage import held_pages, metric, reads, waiting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from harness.servers import Server
    from vllm_stage import Stage

pytestmark = [pytest.mark.integration, pytest.mark.restarts]

SLOW_S = 5.0  # per slice of 64 KiB: a page has four, so a prompt outlasts any test
#: Thirty-two of them on two lanes last longer than a test waits to see them under way (IDLE_S),
#: and end while it runs.
STEADY_S = 1.5
DEAD_S = 12.0  # a peer is dead after 10 s of silence; one that was killed is so at once


@pytest.fixture(autouse=True)
def everything_is_found_again(
    stage: Stage, proxies: dict[str, Server], prompt: Callable[[int], list[int]]
) -> Iterator[None]:
    """After each test the pair works in every way, through proxies that were never restarted."""
    yield
    received = Transfers.of(stage.decode.url).requests
    ids = prompt(300)
    assert prefill_first(stage, ids) == ask(stage.aggregated, ids)
    assert Transfers.of(stage.decode.url).requests == received + 1
    for proxy in proxies.values():
        until(proxy.healthy, 30, "the proxy has found both sides")
        alone = metric(proxy, "mooncake_proxy_recomputed_total")
        ids = prompt(300)
        assert ask(proxy, ids) == ask(stage.aggregated, ids)
        assert metric(proxy, "mooncake_proxy_recomputed_total") == alone


def in_mid_transfer(stage: Stage, params: dict[str, Any], requests: int = 1) -> None:
    """Return when that transfer's pages are being read, slowly, and so many requests wait."""
    until(lambda: reads(stage.decode, params["transfer_id"]), IDLE_S, "decode reads")
    until(lambda: waiting(stage.decode) == requests, IDLE_S, "decode waits for KV")
    until(lambda: held_pages(stage.prefill) > 0, IDLE_S, "prefill holds the pages")


@pytest.mark.parametrize("path", ["tcp", "shm"])
def test_a_prefill_that_stands_still_is_given_up_and_taken_back(
    stage: Stage, prompt: Callable[[int], list[int]], path: str
) -> None:
    with_policy(stage, "recompute")
    ids = prompt(500)
    params = prefill_leg(stage, ids) | slowed(path, SLOW_S)
    with Client(stage.decode, ids, stream=True, kv_transfer_params=params) as client:
        in_mid_transfer(stage, params)
        stage.prefill.signal(signal.SIGSTOP)
        try:
            stopped = time.monotonic()
            tokens = client.streamed()
            took = time.monotonic() - stopped
        finally:
            stage.prefill.signal(signal.SIGCONT)
    assert [tokens] == ask(stage.aggregated, ids)
    assert took < DEAD_S + IDLE_S
    until(lambda: held_pages(stage.prefill) == 0, DEAD_S, "prefill noticed that decode went")


def test_a_decode_that_stands_still_never_uses_pages_that_were_given_away(
    stage: Stage, prompt: Callable[[int], list[int]]
) -> None:
    with_policy(stage, "recompute")
    ids = prompt(500)
    params = prefill_leg(stage, ids) | slowed("shm", STEADY_S)
    with Client(stage.decode, ids, stream=True, kv_transfer_params=params) as client:
        in_mid_transfer(stage, params)
        stage.decode.signal(signal.SIGSTOP)
        try:
            until(lambda: held_pages(stage.prefill) == 0, DEAD_S, "prefill gave decode up")
            for _ in range(9):  # 270 pages of 255: every one is written anew
                send(stage.prefill, prompt(1900), max_tokens=1)
        finally:
            stage.decode.signal(signal.SIGCONT)
        tokens = client.streamed()
    assert [tokens] == ask(stage.aggregated, ids)


@pytest.mark.nightly  # one more start than every change can afford; standing still is the same
def test_a_killed_prefill_is_replaced_by_decode_computing_itself(
    stage: Stage, prompt: Callable[[int], list[int]]
) -> None:
    with_policy(stage, "recompute")
    ids = prompt(500)
    params = prefill_leg(stage, ids) | slowed("tcp", SLOW_S)
    gone = metric(stage.decode, "mooncake_connector:failures_total", reason="prefill_gone")
    with Client(stage.decode, ids, stream=True, kv_transfer_params=params) as client:
        in_mid_transfer(stage, params)
        stage.prefill.kill()
        killed = time.monotonic()
        tokens = client.streamed()
    assert [tokens] == ask(stage.aggregated, ids)
    assert time.monotonic() - killed < DEAD_S + IDLE_S
    counted = metric(stage.decode, "mooncake_connector:failures_total", reason="prefill_gone")
    assert counted == gone + 1
    alone = prompt(300)
    assert ask(stage.decode, alone) == ask(stage.aggregated, alone)
    stage.start_prefill()


def test_a_killed_decode_leaves_no_page_held_and_prefill_serves_on(
    stage: Stage, prompt: Callable[[int], list[int]]
) -> None:
    ids = prompt(500)
    params = prefill_leg(stage, ids) | slowed("shm", SLOW_S)
    with Client(stage.decode, ids, stream=True, kv_transfer_params=params):
        in_mid_transfer(stage, params)
        stage.decode.kill()
        until(lambda: held_pages(stage.prefill) == 0, 10, "prefill's pages are free")
    alone = prompt(300)
    assert ask(stage.prefill, alone) == ask(stage.aggregated, alone)
    stage.start_decode("fail")


def test_a_killed_prefill_is_a_clear_error_under_the_policy_fail(
    stage: Stage, proxies: dict[str, Server], prompt: Callable[[int], list[int]]
) -> None:
    """A proxy asks decode once more, without the KV: its client sees none of it."""
    with_policy(stage, "fail")
    ids, proxied = prompt(500), prompt(500)
    expected = ask(stage.aggregated, proxied)
    slow = slowed("tcp", SLOW_S)
    params = prefill_leg(stage, ids) | slow
    with ThreadPoolExecutor(2) as threads:
        direct = threads.submit(send, stage.decode, ids, kv_transfer_params=params)
        through = threads.submit(ask, proxies["prefill-first"], proxied, kv_transfer_params=slow)
        in_mid_transfer(stage, params, requests=2)
        stage.prefill.kill()
        killed = time.monotonic()
        with pytest.raises(CompletionFailed) as failed:
            direct.result(REPLY_S)
        took = time.monotonic() - killed
        assert through.result(REPLY_S) == expected
    assert failed.value.status == http.HTTPStatus.INTERNAL_SERVER_ERROR
    assert took < DEAD_S
    assert "was not received: prefill 127.0.0.1:" in stage.decode.log.read_text()
    alone = prompt(300)
    assert ask(stage.decode, alone) == ask(stage.aggregated, alone)
    stage.start_prefill(
        kv_role="kv_both",
        kv_connector="MooncakeDisaggConnector",
        kv_connector_module_path="mooncake_connector.vllm.connector",
    )


def with_policy(stage: Stage, policy: str) -> None:
    """A decode server with this policy: the running one, when the tests run in their order."""
    if stage.decode_policy != policy:
        stage.decode.stop()
        stage.start_decode(policy)
