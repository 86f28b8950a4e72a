"""Decode's scheduler half: who reads, who waits, who computes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mooncake_connector.vllm.requests_in import DecodeRequests
from mooncake_connector.vllm.step import Step

PARAMS: dict[str, Any] = {
    "do_remote_prefill": True,
    "transfer_id": "t",
    "remote_engine_id": "engine-p",
    "remote_endpoints": ["127.0.0.1:7000"],
    "remote_incarnations": ["ab"],
}


def requests(*, testing: bool = False) -> DecodeRequests:
    return DecodeRequests(64, (0,), (0,), testing=testing)


def blocks(*ids: int) -> list[list[SimpleNamespace]]:
    """One group of vLLM's KVCacheBlock, in the field that the connector reads."""
    return [[SimpleNamespace(block_id=i) for i in ids]]


def test_a_new_request_claims_its_transfer_and_asks_for_all_but_the_last_token() -> None:
    made, step = requests(), Step()
    made.add("r", PARAMS, "key", step)
    assert [c.transfer_id for c in step.claims] == ["t"]
    assert made.matched_tokens("r", 200, 0) == (199, True)
    assert made.matched_tokens("r", 200, 128) == (71, True)


def test_only_pages_behind_the_local_prefix_are_fetched() -> None:
    made, step = requests(), Step()
    made.add("r", PARAMS, "key", step)
    made.allocated("r", 200, blocks(5, 6, 7, 8), 199 - 128, step)
    (fetch,) = step.fetches
    assert (fetch.first, fetch.block_ids) == ((2,), ([7, 8],))


def test_the_page_of_a_lone_last_token_is_not_fetched() -> None:
    made, step = requests(), Step()
    made.add("r", PARAMS, "key", step)
    made.allocated("r", 65, blocks(5, 6), 64, step)
    (fetch,) = step.fetches
    assert fetch.block_ids == ([5],)


@pytest.mark.parametrize(("tokens", "computed"), [(1, 0), (65, 64)])
def test_a_request_with_nothing_to_fetch_releases_at_once(tokens: int, computed: int) -> None:
    made, step = requests(), Step()
    made.add("r", PARAMS, "key", step)
    assert made.matched_tokens("r", tokens, computed) == (0, False)
    made.allocated("r", tokens, blocks(5, 6), 0, step)
    assert [request for request, _ in step.declined] == ["r"]
    assert not step.fetches


def test_a_failed_fetch_is_computed_and_never_promised_again() -> None:
    made, step = requests(), Step()
    made.add("r", PARAMS, "key", step)
    made.allocated("r", 200, blocks(1, 2, 3, 4), 199, step)
    made.received(["r"])
    assert made.matched_tokens("r", 200, 0) == (0, False)


def test_siblings_wait_for_the_reader_and_then_use_the_prefix_cache() -> None:
    made, step = requests(), Step()
    for name in ("r0", "r1", "r2"):
        made.add(name, PARAMS, "key", step)
    assert len(step.claims) == 1
    made.allocated("r0", 200, blocks(1, 2, 3, 4), 199, step)
    assert made.matched_tokens("r1", 200, 0) == (None, False)
    made.received(["r0"])
    assert made.matched_tokens("r1", 200, 0) == (None, False), "its blocks are not cached yet"
    made.allocated("r0", 200, blocks(1, 2, 3, 4), 0, step)
    assert made.matched_tokens("r1", 200, 192) == (0, False)
    made.allocated("r1", 200, blocks(1, 2, 3, 9), 0, step)
    made.finished("r2", step)
    assert not step.declined, "the hold was released by the fetch"


def test_when_the_reader_is_aborted_before_it_began_a_sibling_reads() -> None:
    made, step = requests(), Step()
    made.add("r0", PARAMS, "key", step)
    made.add("r1", PARAMS, "key", step)
    made.finished("r0", step)
    assert not step.declined
    assert made.matched_tokens("r1", 200, 0) == (199, True)
    made.finished("r1", step)
    assert [request for request, _ in step.declined] == ["r1"]


def test_another_prompt_with_the_same_parameters_is_computed_here() -> None:
    made, step = requests(), Step()
    made.add("r0", PARAMS, "key", step)
    made.add("r1", PARAMS, "another", step)
    assert made.matched_tokens("r1", 200, 0) == (0, False)
    assert made.matched_tokens("r0", 200, 0) == (199, True)


def test_a_prompt_that_prefill_did_not_compute_is_not_asked_for() -> None:
    made, step = requests(), Step()
    made.add("r0", {**PARAMS, "remote_prompt_key": "key"}, "another", step)
    made.add("r1", {**PARAMS, "remote_prompt_key": "key"}, "key", step)
    assert made.matched_tokens("r0", 200, 0) == (0, False)
    assert made.matched_tokens("r1", 200, 0) == (199, True)


def test_an_abort_while_loading_cancels_and_a_later_one_does_not() -> None:
    made, step = requests(), Step()
    made.add("r", PARAMS, "key", step)
    made.allocated("r", 200, blocks(1, 2, 3, 4), 199, step)
    made.finished("r", step)
    assert step.cancelled == ["r"]
    made.add("s", PARAMS, "key", step)
    made.allocated("s", 200, blocks(1, 2, 3, 4), 199, step)
    made.received(["s"])
    made.finished("s", step)
    assert step.cancelled == ["r"]


def test_a_request_that_the_api_server_rejected_releases_its_hold() -> None:
    made, step = requests(), Step()
    made.add("r", {**PARAMS, "remote_prompt_key": "key"}, "key of [0]", step)
    made.finished("r", step)
    assert [(request, remote.transfer_id) for request, remote in step.declined] == [("r", "t")]


@pytest.mark.parametrize(
    "params",
    [
        {"transfer_id": None},
        {"transfer_id": 7},
        {"remote_endpoints": None},
        {"remote_endpoints": "127.0.0.1:7000"},
        {"remote_endpoints": [7000]},
        {"remote_endpoints": [], "remote_bootstrap_addr": 8998},
    ],
)
def test_unusable_parameters_are_named_and_the_request_is_computed_here(
    params: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    made, step = requests(), Step()
    made.add("r", {**PARAMS, **params}, "key", step)
    assert made.matched_tokens("r", 200, 0) == (0, False)
    assert next(iter(params)) in caplog.text or "remote_endpoints" in caplog.text
    made.finished("r", step)
    assert step == Step()


def test_a_forced_transport_is_heard_in_tests_only() -> None:
    for testing, expected in ((False, ""), (True, "tcp")):
        made, step = requests(testing=testing), Step()
        made.add("r", {**PARAMS, "test_protocol": "tcp"}, "key", step)
        assert step.claims[0].protocol == expected
