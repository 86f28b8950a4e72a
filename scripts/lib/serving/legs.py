"""A client of `/v1/completions` that sends both legs of a request itself, and sees both answers.

Two dialects. Prefill first, as NIXL's readers and ours: prefill's answer says where the KV is.
Both at once, as Mooncake's and ours: the client names the transfer, and decode asks prefill's
bootstrap server for the rest.
"""

from __future__ import annotations

import http.client
import json
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from harness.completions import MODEL, CompletionFailed, Reply, complete, post
from harness.servers import get

from serving.setup import Exchange

#: With the nulls that NIXL's scheduler looks for.
KEEP_KV: dict[str, Any] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


def prefill_first(
    prefill: str, decode: str, prompt: list[int], max_tokens: int, model: str = MODEL
) -> Exchange:
    """Prefill's leg, then decode's with what prefill answered.

    Raises:
        CompletionFailed: Either server could not do its part, or prefill kept nothing.
    """
    sent = time.monotonic()
    answer = _prefill(prefill, prompt, KEEP_KV, model)
    answered = time.monotonic()
    params = answer.get("kv_transfer_params")
    if not params:
        raise CompletionFailed(200, f"{prefill} answered without kv_transfer_params: {answer}")
    asked = time.monotonic()
    reply = complete(decode, prompt, max_tokens=max_tokens, model=model, kv_transfer_params=params)
    return _exchange(sent, answered, asked, reply)


def both_at_once(
    prefill: str,
    decode: str,
    bootstrap: str,
    prompt: list[int],
    max_tokens: int,
    model: str = MODEL,
) -> Exchange:
    """Both legs side by side; the engine behind `bootstrap` is asked for before the clock starts.

    Raises:
        CompletionFailed: Either server, or the bootstrap server, could not do its part.
    """
    transfer = f"bench-{uuid.uuid4().hex}"
    keep = {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": transfer}
    fetch = {
        "do_remote_decode": False,
        "do_remote_prefill": True,
        "transfer_id": transfer,
        "remote_engine_id": _engine(bootstrap),
        "remote_bootstrap_addr": bootstrap,
    }
    with ThreadPoolExecutor(1) as threads:
        sent = time.monotonic()

        def prefilled() -> float:
            _prefill(prefill, prompt, keep, model)
            return time.monotonic()

        answered = threads.submit(prefilled)
        asked = time.monotonic()
        reply = complete(
            decode, prompt, max_tokens=max_tokens, model=model, kv_transfer_params=fetch
        )
        return _exchange(sent, answered.result(), asked, reply)


def _prefill(url: str, prompt: list[int], params: dict[str, Any], model: str) -> dict[str, Any]:
    body = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0}
    return post(url, "/v1/completions", {**body, "stream": False, "kv_transfer_params": params})


def _engine(bootstrap: str) -> str:
    """Id of the first engine that the bootstrap server knows."""
    try:
        status, body = get(bootstrap, "/query")
    except (OSError, http.client.HTTPException) as exc:
        raise CompletionFailed(0, f"no answer from {bootstrap}/query: {exc}") from exc
    engines = json.loads(body) if status == http.HTTPStatus.OK else {}
    if not engines:
        raise CompletionFailed(status, f"{bootstrap}/query names no engine: {body}")
    return str(next(iter(engines.values()))["engine_id"])


def _exchange(sent: float, answered: float, asked: float, reply: Reply) -> Exchange:
    return Exchange(
        sent=sent,
        prefill_answered=answered,
        first_token=asked + reply.ttft_s,
        tokens=reply.tokens,
    )
