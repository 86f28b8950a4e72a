from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from harness.completions import CompletionFailed, complete, generate, token_prompt

if TYPE_CHECKING:
    from collections.abc import Iterator

Event = dict[str, Any]


class Handler(BaseHTTPRequestHandler):
    """Answers every completion with the events that a test put into `answer`."""

    status: ClassVar[int] = 200
    answer: ClassVar[list[Event]] = []
    asked: ClassVar[list[Event]] = []

    def do_POST(self) -> None:
        self.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(self.status)
        self.end_headers()
        for event in self.answer:
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: object) -> None:
        """Keep pytest's output readable."""


@pytest.fixture
def server() -> Iterator[str]:
    Handler.status, Handler.answer, Handler.asked = 200, [], []
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()
        thread.join()


def chunk(*tokens: int, end: str | None = None) -> Event:
    return {"choices": [{"token_ids": list(tokens), "finish_reason": end}]}


def event(*tokens: int, end: Event | None = None) -> Event:
    """One of SGLang's: all tokens so far."""
    return {"output_ids": list(tokens), "meta_info": {"finish_reason": end}}


def test_the_tokens_of_all_chunks_come_in_order(server: str) -> None:
    Handler.answer = [chunk(5), chunk(6, 7), chunk(8, end="length"), {"choices": []}]
    reply = complete(server, [1, 2, 3], max_tokens=4)
    assert reply.tokens == (5, 6, 7, 8)
    assert reply.finish_reason == "length"
    assert reply.ttft_s > 0
    [asked] = Handler.asked
    assert asked["prompt"] == [1, 2, 3]
    assert asked["max_tokens"] == 4
    assert asked["temperature"] == 0
    assert asked["ignore_eos"]


def test_more_fields_go_into_the_request_and_win(server: str) -> None:
    Handler.answer = [chunk(5, end="stop")]
    complete(server, "hello", ignore_eos=False, kv_transfer_params={"transfer_id": "t"})
    [asked] = Handler.asked
    assert asked["ignore_eos"] is False
    assert asked["kv_transfer_params"] == {"transfer_id": "t"}


def test_an_error_status_is_raised_with_its_text(server: str) -> None:
    Handler.status = 503
    with pytest.raises(CompletionFailed, match="HTTP 503") as caught:
        complete(server, [1])
    assert caught.value.status == 503


def test_an_error_in_the_middle_of_a_stream_is_raised(server: str) -> None:
    Handler.answer = [chunk(5), {"error": {"message": "KV load failed"}}]
    with pytest.raises(CompletionFailed, match="KV load failed"):
        complete(server, [1])


def test_a_stream_that_breaks_off_is_no_completion(server: str) -> None:
    Handler.answer = [chunk(5), chunk(6)]
    with pytest.raises(CompletionFailed, match="after 2 tokens, unfinished"):
        complete(server, [1])


def test_a_prompt_is_the_same_in_every_run_and_another_for_another_seed() -> None:
    assert token_prompt(5, seed=1) == token_prompt(5, seed=1)
    assert token_prompt(65, seed=1)[:64] == token_prompt(64, seed=1)
    assert token_prompt(64, seed=1) != token_prompt(64, seed=2)
    assert len(token_prompt(500, seed=3)) == 500


def test_a_generation_has_each_token_once_though_every_event_has_all_of_them(server: str) -> None:
    Handler.answer = [event(5), event(5, 6, 7), event(5, 6, 7, 8, end={"type": "length"})]
    reply = generate(server, [1, 2, 3], max_tokens=4)
    assert reply.tokens == (5, 6, 7, 8)
    assert reply.finish_reason == "length"
    assert reply.itl_s > 0
    [asked] = Handler.asked
    assert asked["input_ids"] == [1, 2, 3]
    assert asked["sampling_params"]["max_new_tokens"] == 4
    assert asked["sampling_params"]["temperature"] == 0


def test_sampling_parameters_and_fields_of_a_generation_win_over_ours(server: str) -> None:
    Handler.answer = [event(5, end={"type": "stop"})]
    generate(server, [1], sampling={"ignore_eos": False}, bootstrap_room=7)
    [asked] = Handler.asked
    assert asked["sampling_params"]["ignore_eos"] is False
    assert asked["bootstrap_room"] == 7


def test_a_generation_that_the_server_aborts_is_raised_with_its_reason(server: str) -> None:
    end = {"type": "abort", "message": "prefill is gone", "status_code": 500}
    Handler.answer = [event(5), event(5, end=end)]
    with pytest.raises(CompletionFailed, match="prefill is gone"):
        generate(server, [1])


def test_a_generation_that_breaks_off_is_none(server: str) -> None:
    Handler.answer = [event(5), event(5, 6)]
    with pytest.raises(CompletionFailed, match="after 2 tokens, unfinished"):
        generate(server, [1])
