"""The ways a generation can take: one server, two legs by hand, or through the router."""

from __future__ import annotations

import http
import http.client
import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from harness.completions import CompletionFailed, post
from harness.servers import HOST
from server_stage import REPLY_S, LeavingClient

if TYPE_CHECKING:
    from harness.servers import Server
    from sglang_stage import Stage


def body(ids: list[int] | list[list[int]], max_tokens: int = 16, **more: object) -> dict[str, Any]:
    """A greedy request; `more` goes into it, "sampling_params" into those."""
    sampling = {"temperature": 0, "max_new_tokens": max_tokens, "ignore_eos": True}
    sampling |= more.pop("sampling_params", {})  # type: ignore[arg-type]  # a dict
    return {"input_ids": ids, "sampling_params": sampling, **more}


def send(server: Server, ids: list[int] | list[list[int]], **more: object) -> Any:  # noqa: ANN401 - JSON
    """The answer, a list of them for a list of prompts; `CompletionFailed` for an error."""
    return post(server.url, "/generate", body(ids, **more), REPLY_S)


def ask(server: Server, ids: list[int], **more: object) -> list[int]:
    """The token ids that it answers."""
    tokens: list[int] = send(server, ids, **more)["output_ids"]
    return tokens


def meeting(stage: Stage, room: int | None = None) -> dict[str, Any]:
    """What both legs of one request have in common; a new room when none is named."""
    return {
        "bootstrap_host": HOST,
        "bootstrap_port": stage.prefill.bootstrap_port,
        "bootstrap_room": stage.room() if room is None else room,
    }


def moved(path: str = "", delay_s: float = 0) -> dict[str, Any]:
    """How decode servers with `testing` move the KV; every request sets the delay anew."""
    test = ({"protocol": path} if path else {}) | {"delay_s": delay_s}
    return {"sampling_params": {"custom_params": {"mooncake_connector": test}}}


def both(
    stage: Stage, ids: list[int], room: int | None = None, path: str = "", **more: object
) -> list[int]:
    """Both legs by hand, at once, as a router sends them; decode's tokens."""
    where = meeting(stage, room)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(send, stage.prefill, ids, **where, **more)
        tokens = ask(stage.decode, ids, **where, **moved(path), **more)
        first.result(REPLY_S)
    return tokens


def refusal(server: Server, ids: list[int], **more: object) -> CompletionFailed:
    """The error that it answers."""
    try:
        answer = send(server, ids, **more)
    except CompletionFailed as failed:
        return failed
    raise AssertionError(f"answered {answer}")


def abort(server: Server, request_id: str) -> None:
    """What SGLang does some seconds after a client left, now."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=REPLY_S)
    body = json.dumps({"rid": request_id})
    connection.request("POST", "/abort_request", body, {"Content-Type": "application/json"})
    assert connection.getresponse().status == http.HTTPStatus.OK
    connection.close()


class Client(LeavingClient):
    """A request whose client goes away when the test wants it."""

    def __init__(self, server: Server, ids: list[int], **more: object) -> None:
        """Send it; the answer is streamed when `more` says so."""
        super().__init__(server, "/generate", body(ids, **more))
