"""What the proxy writes into the two requests, and how it reads the replies. Pure.

`docs/routers.md` compares these fields with those of vllm-router, field by field.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from mooncake_connector.cluster import Engine

Body = dict[str, Any]

#: Prefill first: what asks a prefill server to keep the KV, with the nulls that NIXL's readers
#: look for, so that the same proxy serves the in-tree connector.
KEEP_KV: Body = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}

#: Prefill computes one token and nobody reads it: what would only cost time there, or what a
#: single token contradicts (vLLM refuses min_tokens > max_tokens, and stream_options alone).
NOT_FOR_PREFILL = (
    "stream_options", "min_tokens", "n", "best_of", "echo", "logprobs", "top_logprobs",
)  # fmt: skip

#: 4xx that tell of the server's state, not of the request.
_SERVERS_OWN = {408, 425, 429}


def bypass_reason(body: Body) -> str:
    """Why this request must not use remote KV; "" when it may.

    Decode then computes everything itself: slower, and right.
    """
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int):
        return "several_prompts"  # they would share one kv_transfer_params
    if body.get("prompt_embeds") is not None:
        return "prompt_embeds"  # no token ids to tell one prompt's KV from another's
    echoed = bool(body.get("echo")) and body.get("logprobs") is not None
    if echoed or body.get("prompt_logprobs") is not None:
        return "prompt_logprobs"  # need a forward pass over the prompt where they are asked
    if body.get("max_tokens") == 0 or body.get("max_completion_tokens") == 0:
        return "no_output"
    if body.get("use_beam_search"):
        return "beam_search"  # many engine requests of one call
    return ""


def prefill_body(body: Body, params: Body) -> Body:
    """The request that makes a prefill server compute and keep the prompt's KV."""
    wanted = {key: value for key, value in body.items() if key not in NOT_FOR_PREFILL}
    wanted |= {"max_tokens": 1, "stream": False, "kv_transfer_params": params}
    if "max_completion_tokens" in body:
        wanted["max_completion_tokens"] = 1
    return wanted


def decode_body(body: Body, params: Body | None) -> Body:
    """The client's request, with the KV's whereabouts, or without: decode computes it all."""
    wanted = {key: value for key, value in body.items() if key != "kv_transfer_params"}
    if params is not None:
        wanted["kv_transfer_params"] = params
    return wanted


def both_at_once(transfer_id: str, engine: Engine, bootstrap: str) -> tuple[Body, Body]:
    """`kv_transfer_params` of the prefill leg and of the decode leg.

    An engine known from its node records is named by its control endpoints; one that only its
    bootstrap server knows, by that server's URL, as vllm-router does.
    """
    prefill: Body = {
        "do_remote_decode": True,
        "do_remote_prefill": False,
        "transfer_id": transfer_id,
    }
    decode: Body = {
        "do_remote_decode": False,
        "do_remote_prefill": True,
        "transfer_id": transfer_id,
        "remote_engine_id": engine.engine_id,
    }
    if bootstrap:
        decode["remote_bootstrap_addr"] = bootstrap
    else:
        decode["remote_endpoints"] = list(engine.controls)
        decode["remote_incarnations"] = list(engine.incarnations)
    return prefill, decode


def users_mistake(status: int) -> bool:
    """True for a status that another server would give as well."""
    return 400 <= status < 500 and status not in _SERVERS_OWN


def server_failed(status: int, first: bytes) -> bool:
    """True when a reply whose body begins with `first` says that the server could not do it.

    vLLM sends a stream's 200 before the engine has begun: a failed KV load is then an event.
    """
    if status >= 500:
        return True
    if not first.startswith(b'data: {"error"'):
        return False
    event = first.split(b"\n", 1)[0].removeprefix(b"data: ")
    try:
        return msgspec.json.decode(event, type=_ErrorEvent).error.code >= 500
    except msgspec.DecodeError:
        return False


def error_body(status: int, message: str) -> bytes:
    """An error as OpenAI's and vLLM's clients read it."""
    kind = {400: "BadRequestError", 404: "NotFoundError", 405: "MethodNotAllowedError",
            413: "RequestTooLargeError", 503: "ServiceUnavailableError",
            504: "TimeoutError"}.get(status, "InternalServerError")  # fmt: skip
    error = {"message": message, "type": kind, "param": None, "code": status}
    return msgspec.json.encode({"error": error})


class _ErrorCode(msgspec.Struct):
    code: int


class _ErrorEvent(msgspec.Struct):
    error: _ErrorCode
