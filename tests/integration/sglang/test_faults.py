"""A side that is killed or stands still in mid-transfer, and the other that serves on.

Starting a server takes a minute: prefill is started again once, decode not at all.
"""

from __future__ import annotations

import http
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from harness.completions import CompletionFailed
from harness.servers import HOST, get
from server_stage import IDLE_S, REPLY_S, until
from sglang_requests import ask, both, meeting, moved, refusal, send
from sglang_stage import at_rest, load

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness.sglang import SGLangServer
    from sglang_stage import Stage

pytestmark = [pytest.mark.integration, pytest.mark.restarts]

SLOW_S = 5.0  # per slice of 64 KiB: a page has four, so a prompt outlasts any test
KILLED_S = 10.0  # one that was killed is dead at once, since its sockets reset
SILENT_S = 15.0  # one that stands still is dead after 10 s


def published(prefill: SGLangServer) -> bool:
    """Does its bootstrap server know its ranks?"""
    everything = "prefill_dp_rank=-1&prefill_cp_rank=-1&target_tp_rank=-1&target_pp_rank=-1"
    url = f"http://{HOST}:{prefill.bootstrap_port}"
    return get(url, f"/route?{everything}")[0] == http.HTTPStatus.OK


def test_a_prefill_that_stands_still_is_given_up_and_taken_back(
    stage: Stage, prompt: Callable[[int], list[int]]
) -> None:
    ids, where = prompt(500), meeting(stage)
    with ThreadPoolExecutor(2) as threads:
        prefilling = threads.submit(refusal, stage.prefill, ids, **where)
        decoding = threads.submit(refusal, stage.decode, ids, **where, **moved("tcp", SLOW_S))
        until(lambda: load(stage.prefill)["inflight"] == 1, IDLE_S, "decode reads")
        stage.prefill.signal(signal.SIGSTOP)
        try:
            said = decoding.result(SILENT_S)
        finally:
            stage.prefill.signal(signal.SIGCONT)
        # Whichever is noticed first: no heartbeat for 10 s, or a new lane that nobody serves.
        assert f"{HOST}:" in str(said)
        assert "it was silent for" in str(said) or "said nothing for" in str(said)
        assert "decode" in str(prefilling.result(SILENT_S))
    until(lambda: published(stage.prefill), IDLE_S, "its lease ended: it publishes itself again")
    ids = prompt(300)
    assert both(stage, ids) == ask(stage.aggregated, ids)


def test_a_killed_prefill_is_named_to_all_that_wait_and_its_successor_serves_at_once(
    stage: Stage, prompt: Callable[[int], list[int]]
) -> None:
    ids, reading = prompt(500), meeting(stage)
    with ThreadPoolExecutor(3) as threads:
        prefilling = threads.submit(send, stage.prefill, ids, **reading)
        legs = [
            threads.submit(refusal, stage.decode, ids, **reading, **moved(delay_s=SLOW_S)),
            threads.submit(
                refusal, stage.decode, prompt(300), **meeting(stage), **moved(delay_s=SLOW_S)
            ),
        ]
        until(lambda: load(stage.prefill)["inflight"] == 1, IDLE_S, "decode reads")
        until(lambda: load(stage.decode)["transfer"] == 2, IDLE_S, "another waits for prefill")
        stage.prefill.kill()
        killed = time.monotonic()
        for leg in legs:
            said = leg.result(KILLED_S)
            assert said.status == 500
            assert f"prefill {HOST}:" in str(said)
        assert time.monotonic() - killed < KILLED_S
        with pytest.raises((OSError, CompletionFailed)):
            prefilling.result(REPLY_S)
    until(lambda: at_rest(stage.decode), IDLE_S, "decode's pages are free")

    began = time.monotonic()
    said = refusal(stage.decode, prompt(300), **meeting(stage))
    assert f"{HOST}:{stage.prefill.bootstrap_port}" in str(said)
    assert time.monotonic() - began < KILLED_S

    stage.restart_prefill()
    ids = prompt(300)
    began = time.monotonic()
    tokens = both(stage, ids)
    assert time.monotonic() - began < KILLED_S
    assert tokens == ask(stage.aggregated, ids)
    until(stage.router.healthy, REPLY_S, "the router has found it again")
    assert ask(stage.router, ids) == tokens


@pytest.mark.leaves_none
def test_a_killed_decode_ends_prefills_leg_and_frees_its_pages(session_stage: Stage) -> None:
    stage = session_stage
    stage.alive()
    ids, where = stage.prompt(500, "killed decode"), meeting(stage)
    with ThreadPoolExecutor(2) as threads:
        prefilling = threads.submit(refusal, stage.prefill, ids, **where)
        decoding = threads.submit(send, stage.decode, ids, **where, **moved("shm", SLOW_S))
        until(lambda: load(stage.prefill)["inflight"] == 1, IDLE_S, "decode reads")
        stage.decode.kill()
        said = prefilling.result(KILLED_S)
        assert said.status == 500
        assert "decode node" in str(said)
        with pytest.raises((OSError, CompletionFailed)):
            decoding.result(REPLY_S)
    until(lambda: at_rest(stage.prefill), IDLE_S, "prefill's pages are free")
    assert stage.prefill.running
