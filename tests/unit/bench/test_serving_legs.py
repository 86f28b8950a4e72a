"""The client that sends both legs of a request, against servers that note what they are sent."""

from __future__ import annotations

import json
import threading
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest
from harness.completions import CompletionFailed
from serving.legs import KEEP_KV, both_at_once, prefill_first

if TYPE_CHECKING:
    from collections.abc import Iterator

Body = dict[str, Any]
PARAMS = {"do_remote_prefill": True, "remote_block_ids": [1, 2]}
EVENTS = [
    {"choices": [{"token_ids": [7]}]},
    {"choices": [{"token_ids": [8, 9], "finish_reason": "length"}]},
]


class Handler(BaseHTTPRequestHandler):
    """Prefill, decode and bootstrap server in one; the query of a request says which it was."""

    def do_GET(self) -> None:
        self._send(json.dumps({"0": {"engine_id": "engine-1"}}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server: Any = self.server
        server.asked.append(body)
        if body["stream"]:
            # Both at once: decode's answer cannot come before prefill was asked.
            assert server.prefill_asked.wait(10)
            self._send(
                b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in EVENTS)
            )
            return
        server.prefill_asked.set()
        self._send(json.dumps({"kv_transfer_params": server.params}).encode())

    def _send(self, data: bytes) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Keep pytest's output readable."""


class Listening(ThreadingHTTPServer):
    params: Body | None = PARAMS

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[Body] = []
        self.prefill_asked = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def server() -> Iterator[Listening]:
    with ExitStack() as stack:
        listening = stack.enter_context(Listening())
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        stack.callback(thread.join)
        stack.callback(listening.shutdown)
        yield listening


def test_prefill_first_hands_decode_what_prefill_answered(server: Listening) -> None:
    seen = prefill_first(server.url, server.url, [5, 6], 3)
    first, second = server.asked
    assert (first["max_tokens"], first["kv_transfer_params"]) == (1, KEEP_KV)
    assert (second["max_tokens"], second["kv_transfer_params"]) == (3, PARAMS)
    assert seen.tokens == (7, 8, 9)
    assert seen.sent <= seen.prefill_answered <= seen.first_token


def test_a_prefill_that_kept_nothing_is_no_handover(server: Listening) -> None:
    server.params = None
    with pytest.raises(CompletionFailed, match="without kv_transfer_params"):
        prefill_first(server.url, server.url, [5, 6], 3)
    assert len(server.asked) == 1


def test_both_at_once_names_one_transfer_to_both_and_the_engine_to_decode(
    server: Listening,
) -> None:
    seen = both_at_once(server.url, server.url, server.url, [5, 6], 3)
    by_leg = {body["stream"]: body["kv_transfer_params"] for body in server.asked}
    assert by_leg[False]["transfer_id"] == by_leg[True]["transfer_id"]
    assert by_leg[True]["remote_engine_id"] == "engine-1"
    assert by_leg[True]["remote_bootstrap_addr"] == server.url
    assert seen.tokens == (7, 8, 9)


def test_the_handover_is_the_gap_without_decodes_own_steps(server: Listening) -> None:
    seen = prefill_first(server.url, server.url, [5, 6], 3)
    assert seen.handover_s(0.25) == pytest.approx(seen.gap_s - 0.25)
