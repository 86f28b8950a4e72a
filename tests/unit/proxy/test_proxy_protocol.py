from __future__ import annotations

import json
from typing import Any

import pytest

from mooncake_connector.cluster import Engine
from mooncake_connector.proxy.protocol import (
    KEEP_KV,
    both_at_once,
    bypass_reason,
    decode_body,
    error_body,
    prefill_body,
    server_failed,
    users_mistake,
)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"prompt": "a"}, ""),
        ({"prompt": ["a"]}, ""),
        ({"prompt": [1, 2, 3]}, ""),
        ({"prompt": [[1, 2, 3]]}, ""),
        ({"prompt": []}, ""),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}, ""),
        ({"prompt": "a", "n": 3, "logprobs": 1}, ""),
        ({"prompt": "a", "echo": True}, ""),
        ({"prompt": ["a", "b"]}, "several_prompts"),
        ({"prompt": [[1], [2]]}, "several_prompts"),
        ({"prompt_embeds": "AAAA"}, "prompt_embeds"),
        ({"prompt": "a", "prompt_logprobs": 0}, "prompt_logprobs"),
        ({"prompt": "a", "echo": True, "logprobs": 0}, "prompt_logprobs"),
        ({"prompt": "a", "max_tokens": 0}, "no_output"),
        ({"prompt": "a", "use_beam_search": True}, "beam_search"),
    ],
)
def test_only_requests_whose_kv_is_one_prompts_use_remote_kv(
    body: dict[str, Any], reason: str
) -> None:
    assert bypass_reason(body) == reason


def test_prefill_computes_one_token_that_nobody_reads() -> None:
    body = {
        "model": "m", "prompt": [1], "max_tokens": 9, "min_tokens": 4, "n": 2, "logprobs": 5,
        "stream": True, "stream_options": {"include_usage": True}, "temperature": 0.5, "echo": True,
    }  # fmt: skip
    assert prefill_body(body, KEEP_KV) == {
        "model": "m",
        "prompt": [1],
        "temperature": 0.5,
        "max_tokens": 1,
        "stream": False,
        "kv_transfer_params": KEEP_KV,
    }
    assert body["n"] == 2, "the client's own request stays as it was"


def test_prefill_of_a_chat_limits_both_names_of_the_limit() -> None:
    wanted = prefill_body({"messages": [], "max_completion_tokens": 9}, {})
    assert (wanted["max_tokens"], wanted["max_completion_tokens"]) == (1, 1)


def test_decode_gets_the_clients_request_and_only_our_params() -> None:
    body = {"prompt": "a", "kv_transfer_params": {"of": "the client"}}
    assert decode_body(body, {"of": "ours"}) == {
        "prompt": "a",
        "kv_transfer_params": {"of": "ours"},
    }
    assert decode_body(body, None) == {"prompt": "a"}


def test_an_engine_of_the_bootstrap_server_is_named_as_vllm_router_names_it() -> None:
    engine = Engine("e", 0, (), ())
    assert both_at_once("xfer-1", engine, "http://p:8998") == (
        {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": "xfer-1"},
        {
            "do_remote_decode": False,
            "do_remote_prefill": True,
            "transfer_id": "xfer-1",
            "remote_bootstrap_addr": "http://p:8998",
            "remote_engine_id": "e",
        },
    )


def test_an_engine_of_the_node_records_is_named_by_its_ranks() -> None:
    decode = both_at_once("xfer-1", Engine("e", 0, ("h:1", "h:2"), ("i1", "i2")), "")[1]
    assert decode["remote_endpoints"] == ["h:1", "h:2"]
    assert decode["remote_incarnations"] == ["i1", "i2"]
    assert "remote_bootstrap_addr" not in decode


@pytest.mark.parametrize(
    ("status", "mistake"),
    [
        *((status, True) for status in (400, 401, 404, 422)),
        *((status, False) for status in (200, 408, 429, 500, 503)),
    ],
)
def test_a_full_or_broken_server_is_not_the_clients_mistake(status: int, mistake: bool) -> None:
    assert users_mistake(status) is mistake


EVENT = b'data: {"error": {"message": "KV load", "type": "x", "param": null, "code": %d}}\n\n'


@pytest.mark.parametrize(
    ("status", "first", "failed"),
    [
        (500, b"{}", True),
        (200, EVENT % 500 + b"data: [DONE]\n\n", True),
        (200, EVENT % 400, False),
        (200, b'data: {"error": "half', False),
        (200, b'data: {"choices": [{"text": "code 500"}]}\n\n', False),
        (400, b"{}", False),
        (200, b"", False),
    ],
)
def test_a_failure_is_seen_in_the_status_and_in_the_first_event(
    status: int, first: bytes, failed: bool
) -> None:
    assert server_failed(status, first) is failed


def test_an_error_reads_like_openais() -> None:
    assert json.loads(error_body(503, "nobody")) == {
        "error": {
            "message": "nobody",
            "type": "ServiceUnavailableError",
            "param": None,
            "code": 503,
        }
    }
