"""Clients of `/v1/completions` and SGLang's `/generate` that keep token ids and their times."""

from __future__ import annotations

import http.client
import itertools
import json
import random
import statistics
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterator

MODEL = "tiny"
FIRST_TOKEN_ID, LAST_TOKEN_ID = 3, 511  # of the tiny model, without <pad>, <s> and </s>


class CompletionFailed(RuntimeError):
    """The server answered with an error, in place of a completion or in the middle of one."""

    def __init__(self, status: int, body: str) -> None:
        super().__init__(f"HTTP {status}: {body}")
        self.status = status


class Reply(msgspec.Struct, frozen=True):
    """One completion.

    Attributes:
        tokens: Generated token ids.
        ttft_s: From sending the request to its first token.
        itl_s: Mean time between two tokens; 0 for a single one.
        finish_reason: As the server said it.
        meta: SGLang's `meta_info` behind the last token.
    """

    tokens: tuple[int, ...]
    ttft_s: float
    itl_s: float
    finish_reason: str
    meta: dict[str, Any] = {}


def token_prompt(length: int, seed: int) -> list[int]:
    """`length` token ids that are the same in every run."""
    choose = random.Random(seed)  # noqa: S311 - wanted: the same everywhere
    return [choose.randint(FIRST_TOKEN_ID, LAST_TOKEN_ID) for _ in range(length)]


def complete(
    url: str,
    prompt: list[int] | str,
    *,
    max_tokens: int = 16,
    timeout_s: float = 300,
    **more: object,
) -> Reply:
    """Stream one greedy completion from the server at `url` (scheme, host and port).

    `more` goes into the request as it is. `timeout_s` bounds each wait for bytes.

    Raises:
        CompletionFailed: For any answer that is not a whole completion.
    """
    body = {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": True,
        **more,
    }
    sent = time.monotonic()
    tokens: list[int] = []
    times: list[float] = []
    reason = ""
    for event in _events(url, "/v1/completions", body, timeout_s):
        if "error" in event:
            raise CompletionFailed(200, json.dumps(event["error"]))
        for choice in event["choices"]:
            new = choice.get("token_ids") or []
            tokens += new
            times += [time.monotonic()] * len(new)
            reason = choice.get("finish_reason") or reason
    return _reply(sent, tokens, times, reason)


def generate(
    url: str,
    prompt: list[int],
    *,
    max_tokens: int = 16,
    timeout_s: float = 300,
    sampling: dict[str, object] | None = None,
    **more: object,
) -> Reply:
    """Stream one greedy generation from the SGLang server, or router, at `url`.

    `sampling` goes into the sampling parameters, `more` into the request, as they are.
    `timeout_s` bounds each wait for bytes.

    Raises:
        CompletionFailed: For any answer that is not a whole generation.
    """
    body = {
        "input_ids": prompt,
        "sampling_params": {
            "temperature": 0,
            "max_new_tokens": max_tokens,
            "ignore_eos": True,
            **(sampling or {}),
        },
        "stream": True,
        **more,
    }
    sent = time.monotonic()
    tokens: list[int] = []
    times: list[float] = []
    reason = ""
    meta: dict[str, Any] = {}
    for event in _events(url, "/generate", body, timeout_s):
        if "error" in event:
            raise CompletionFailed(200, json.dumps(event["error"]))
        new = event["output_ids"][len(tokens) :]  # each event holds all tokens so far
        tokens += new
        times += [time.monotonic()] * len(new)
        meta = event["meta_info"]
        finish = meta["finish_reason"]
        if finish is not None and finish["type"] == "abort":
            raise CompletionFailed(200, json.dumps(finish))
        reason = finish["type"] if finish is not None else reason
    return _reply(sent, tokens, times, reason, meta)


def _reply(
    sent: float,
    tokens: list[int],
    times: list[float],
    reason: str,
    meta: dict[str, Any] | None = None,
) -> Reply:
    if not reason:
        raise CompletionFailed(200, f"the stream ended after {len(tokens)} tokens, unfinished")
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    return Reply(
        tokens=tuple(tokens),
        ttft_s=(times[0] if times else time.monotonic()) - sent,
        itl_s=statistics.fmean(gaps) if gaps else 0.0,
        finish_reason=reason,
        meta=meta or {},
    )


def post(url: str, path: str, body: dict[str, Any], timeout_s: float = 300) -> dict[str, Any]:
    """One JSON request and its JSON answer; `CompletionFailed` for any status but 200."""
    answer: dict[str, Any] = json.loads(b"".join(_lines(url, path, body, timeout_s)))
    return answer


def _events(
    url: str, path: str, body: dict[str, Any], timeout_s: float
) -> Iterator[dict[str, Any]]:
    """The JSON objects of a server-sent event stream, each as soon as it is there."""
    for line in _lines(url, path, body, timeout_s):
        data = line.strip().removeprefix(b"data: ")
        if data and data != b"[DONE]":
            yield json.loads(data)


def _lines(url: str, path: str, body: dict[str, Any], timeout_s: float) -> Iterator[bytes]:
    host = urlsplit(url).netloc
    connection = http.client.HTTPConnection(host, timeout=timeout_s)
    try:
        connection.request(
            "POST", path, json.dumps(body), headers={"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        if response.status != http.HTTPStatus.OK:
            raise CompletionFailed(response.status, response.read().decode(errors="replace"))
        yield from response
    finally:
        connection.close()
