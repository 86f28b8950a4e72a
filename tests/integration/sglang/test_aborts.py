"""A leg that ends early, wherever it is, ends the other one and gives all pages back."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from harness.sglang import POOL_TOKENS
from server_stage import IDLE_S, REPLY_S, until
from sglang_requests import Client, abort, ask, both, meeting, moved, refusal, send
from sglang_stage import load

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future

    from harness.completions import CompletionFailed
    from sglang_stage import Stage

pytestmark = pytest.mark.integration

#: Per slice of 64 KiB: a page has four, so a prompt outlasts any test.
SLOW_S = 5.0
#: From a client's leaving to the other leg's end: SGLang itself waits 2 to 4 s of it.
ENDS_S = 10.0
#: The longest prompt that decode admits: it keeps room for 512 more tokens.
LONGEST = POOL_TOKENS - 512


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def serves_on(stage: Stage, ids: list[int]) -> None:
    """The pair is at rest, and right about a prompt."""
    stage.idle()
    assert both(stage, ids) == ask(stage.aggregated, ids)


def ended(leg: Future[CompletionFailed], since: float) -> str:
    """Why this leg was given up, in time."""
    failed = leg.result(ENDS_S)
    assert time.monotonic() - since < ENDS_S
    assert failed.status == 500
    return str(failed)


@pytest.mark.parametrize("path", ["tcp", "shm"])
def test_a_client_that_leaves_while_decode_reads_ends_the_reading_and_prefills_leg(
    stage: Stage, prompt: Callable[[int], list[int]], threads: ThreadPoolExecutor, path: str
) -> None:
    ids, where = prompt(500), meeting(stage)
    prefilling = threads.submit(refusal, stage.prefill, ids, **where)
    with Client(stage.decode, ids, **where, **moved(path, SLOW_S)):
        until(lambda: load(stage.decode)["transfer"] == 1, IDLE_S, "decode reads")
        until(lambda: load(stage.prefill)["inflight"] == 1, IDLE_S, "prefill holds the pages")
    assert "decode gave it up" in ended(prefilling, time.monotonic())
    serves_on(stage, prompt(300))


def test_a_client_that_leaves_while_decode_has_no_room_ends_prefills_leg(
    stage: Stage, prompt: Callable[[int], list[int]], threads: ThreadPoolExecutor
) -> None:
    large, ids = prompt(LONGEST), prompt(300)
    filling, where = meeting(stage), meeting(stage)
    threads.submit(refusal, stage.prefill, large, **filling)
    with Client(stage.decode, large, **filling, **moved(delay_s=SLOW_S)):
        until(lambda: load(stage.prefill)["inflight"] == 1, IDLE_S, "decode's pool is full")
        prefilling = threads.submit(refusal, stage.prefill, ids, **where)
        with Client(stage.decode, ids, **where, **moved(delay_s=SLOW_S)):
            until(lambda: load(stage.decode)["prealloc"] == 1, IDLE_S, "another waits for room")
        assert "decode gave it up" in ended(prefilling, time.monotonic())
    serves_on(stage, prompt(300))


def test_a_client_that_leaves_decode_before_prefill_was_asked_is_not_waited_for(
    stage: Stage, prompt: Callable[[int], list[int]]
) -> None:
    ids, where = prompt(300), meeting(stage)
    with Client(stage.decode, ids, **where):
        until(lambda: load(stage.decode)["transfer"] == 1, IDLE_S, "decode waits for prefill")
    until(lambda: load(stage.decode)["waiting"] == 0, ENDS_S, "decode gave it up")
    began = time.monotonic()
    assert "decode gave it up" in str(refusal(stage.prefill, ids, **where))
    assert time.monotonic() - began < ENDS_S
    serves_on(stage, prompt(300))


def test_a_client_that_leaves_while_decode_writes_ends_the_answer(
    stage: Stage, prompt: Callable[[int], list[int]], threads: ThreadPoolExecutor
) -> None:
    ids, where = prompt(200), meeting(stage)
    prefilling = threads.submit(send, stage.prefill, ids, **where)
    with Client(stage.decode, ids, max_tokens=4000, stream=True, **where) as client:
        next(client.events())
        prefilling.result(REPLY_S)
        until(lambda: load(stage.decode)["running"] == 1, IDLE_S, "decode writes")
    serves_on(stage, prompt(300))


def test_a_client_that_leaves_prefill_before_decode_came_leaves_nothing_behind(
    stage: Stage, prompt: Callable[[int], list[int]]
) -> None:
    ids, where = prompt(300), meeting(stage)
    with Client(stage.prefill, ids, **where):
        until(lambda: load(stage.prefill)["bootstrap"] == 1, IDLE_S, "prefill waits for decode")
    until(lambda: load(stage.prefill)["waiting"] == 0, ENDS_S, "prefill gave it up")
    began = time.monotonic()
    assert "Aborted" in str(refusal(stage.decode, ids, **where))
    assert time.monotonic() - began < ENDS_S
    serves_on(stage, prompt(300))


@pytest.mark.parametrize("path", ["tcp", "shm"])
def test_a_client_that_leaves_prefill_while_decode_reads_ends_decodes_leg(
    stage: Stage, prompt: Callable[[int], list[int]], threads: ThreadPoolExecutor, path: str
) -> None:
    ids, where = prompt(500), meeting(stage)
    decoding = threads.submit(refusal, stage.decode, ids, **where, **moved(path, SLOW_S))
    with Client(stage.prefill, ids, **where):
        until(lambda: load(stage.prefill)["inflight"] == 1, IDLE_S, "prefill holds the pages")
    assert "Aborted" in ended(decoding, time.monotonic())
    serves_on(stage, prompt(300))


def test_a_prefill_aborted_between_two_chunks_ends_decodes_leg(
    stage: Stage, prompt: Callable[[int], list[int]], threads: ThreadPoolExecutor
) -> None:
    ids, where = prompt(LONGEST), meeting(stage)
    decoding = threads.submit(refusal, stage.decode, ids, **where, **moved(delay_s=SLOW_S))
    until(lambda: load(stage.decode)["transfer"] == 1, IDLE_S, "decode waits for prefill")
    prefilling = threads.submit(refusal, stage.prefill, ids, rid="in chunks", **where)
    until(lambda: load(stage.prefill)["used tokens"] > 0, IDLE_S, "prefill computes")
    abort(stage.prefill, "in chunks")
    assert "Aborted" in ended(decoding, time.monotonic())
    assert "Abort" in str(prefilling.result(ENDS_S))
    serves_on(stage, prompt(300))


@pytest.mark.nightly  # it waits for 30 s
def test_decode_gives_up_a_prefill_that_never_comes(
    stage: Stage, prompt: Callable[[int], list[int]]
) -> None:
    """After `unknown_transfer_grace_s`, 30 s: two legs of one request may come that far apart."""
    began = time.monotonic()
    said = refusal(stage.decode, prompt(300), **meeting(stage))
    assert "unknown_transfer_grace_s" in str(said)
    assert time.monotonic() - began < 30 + ENDS_S


def test_a_client_that_leaves_the_router_ends_both_legs(
    stage: Stage, prompt: Callable[[int], list[int]]
) -> None:
    for length in (7000, 5000):  # seconds of prefill; the router hands no slowing down on
        with Client(stage.router, prompt(length), stream=True):
            until(lambda: load(stage.decode)["transfer"] == 1, IDLE_S, "decode reads")
        until(lambda: load(stage.decode)["waiting"] == 0, ENDS_S, "decode gave it up")
        until(lambda: load(stage.prefill)["waiting"] == 0, ENDS_S, "prefill gave it up")
    ids = prompt(LONGEST)
    assert both(stage, ids) == ask(stage.aggregated, ids)
