"""Both legs of a request, to real HTTP servers that answer as SGLang's do."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from harness.completions import CompletionFailed
from harness.servers import free_port
from rich.console import Console
from serving.setup import Place, SetupFailed
from serving.sglang_requests import asking, handing
from serving.sglang_setups import user_run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TIMEOUT_S = 20.0
BOOTSTRAP = "http://127.0.0.2:8998"


class Leg(BaseHTTPRequestHandler):
    """One server of a pair; its first token waits for the other server's request, as SGLang's."""

    tokens: ClassVar[tuple[int, ...]] = ()
    met: ClassVar[threading.Barrier]
    asked: ClassVar[dict[str, Any]]
    said: ClassVar[dict[str, Any]] = {}

    def do_POST(self) -> None:
        kind = type(self)
        kind.asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        kind.met.wait(TIMEOUT_S)
        self.send_response(200 if self.tokens else 500)
        self.end_headers()
        for number in range(1, len(self.tokens) + 1):
            end = {"type": "length"} if number == len(self.tokens) else None
            meta = {"finish_reason": end, **self.said}
            event = {"output_ids": self.tokens[:number], "meta_info": meta}
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")

    def log_message(self, *_: object) -> None:
        """Keep pytest's output readable."""


@contextlib.contextmanager
def serving(*tokens: int, met: threading.Barrier, **said: float) -> Iterator[tuple[str, type[Leg]]]:
    kind = type("ThisLeg", (Leg,), {"tokens": tokens, "met": met, "said": said})
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as listening:
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}", kind
        listening.shutdown()
        thread.join()


def test_both_legs_are_under_way_at_once_and_name_the_same_room() -> None:
    met = threading.Barrier(2)  # breaks when one leg waits for the other's answer
    with (
        serving(7, met=met, prefill_finished_time=time.time()) as (prefill, first),
        serving(7, 8, 9, met=met) as (decode, second),
    ):
        exchange = handing(prefill, decode, BOOTSTRAP)([1, 2, 3], 3)
        again = handing(prefill, decode, BOOTSTRAP)
        room = first.asked["bootstrap_room"]
        assert room == second.asked["bootstrap_room"] > 0
        assert (first.asked["bootstrap_host"], first.asked["bootstrap_port"]) == ("127.0.0.2", 8998)
        assert first.asked["input_ids"] == second.asked["input_ids"] == [1, 2, 3]
        assert exchange.tokens == (7, 8, 9)
        assert exchange.sent < exchange.first_token
        again([1], 1)
        assert first.asked["bootstrap_room"] != room


def test_the_handover_begins_where_prefill_says_that_the_prompt_was_computed() -> None:
    met = threading.Barrier(2)
    before = time.monotonic()
    with (
        serving(7, met=met, prefill_finished_time=time.time() - 100) as (prefill, _),
        serving(7, 8, met=met) as (decode, _),
    ):
        exchange = handing(prefill, decode, BOOTSTRAP)([1], 2)
    assert exchange.prefill_answered == pytest.approx(before - 100, abs=20)
    # Decode's first token is prefill's: there is no step of decode's own in it.
    assert exchange.handover_s(step_s=1000.0) == exchange.gap_s
    assert exchange.gap_s > 80


def test_a_prefill_that_does_not_say_when_it_had_computed_the_prompt_is_refused() -> None:
    met = threading.Barrier(2)
    with (
        serving(7, met=met) as (prefill, _),
        serving(7, 8, met=met) as (decode, _),
        pytest.raises(CompletionFailed, match="no prefill_finished_time"),
    ):
        handing(prefill, decode, BOOTSTRAP)([1], 2)


def test_a_leg_that_fails_fails_the_exchange() -> None:
    met = threading.Barrier(2)
    with (
        serving(met=met) as (prefill, _),
        serving(7, 8, met=met) as (decode, _),
        pytest.raises(CompletionFailed, match="HTTP 500"),
    ):
        handing(prefill, decode, BOOTSTRAP)([1, 2, 3], 2)


def test_a_request_through_the_router_names_no_room() -> None:
    with serving(5, 6, met=threading.Barrier(1)) as (url, leg):
        assert asking(url)([1, 2], 2).tokens == (5, 6)
        assert "bootstrap_room" not in leg.asked


def test_servers_that_the_user_runs_are_asked_and_nothing_is_handed_over(tmp_path: Path) -> None:
    place = Place(tmp_path, tmp_path, Console())
    with serving(5, 6, met=threading.Barrier(1)) as (url, leg):
        (setup,) = user_run([f"mine={url}"], [])
        with setup.open(place) as running:
            assert leg.asked["input_ids"], "the first slow request comes before any that is timed"
            assert running.ask([1, 2], 2).tokens == (5, 6)
            assert running.hand is None
            assert running.timers() == {}
    assert (setup.framework, setup.servers, setup.kind) == ("url", 0, "aggregated")


def test_a_pair_that_the_user_runs_hands_over_by_its_bootstrap_server(tmp_path: Path) -> None:
    place = Place(tmp_path, tmp_path, Console())
    met = threading.Barrier(2)
    with (
        serving(5, 6, met=threading.Barrier(1)) as (router, _),
        serving(7, met=met, prefill_finished_time=time.time()) as (prefill, first),
        serving(7, 8, met=met) as (decode, _),
    ):
        names = [f"one={router}", f"ours, mine={router}"]
        one, ours = user_run(names, [f"ours, mine={prefill},{decode},http://10.0.0.1:9009"])
        assert (one.kind, ours.kind) == ("aggregated", "ours")
        with ours.open(place) as running:
            assert running.hand is not None
            assert running.hand([1, 2], 2).tokens == (7, 8)
        assert first.asked["bootstrap_port"] == 9009


def test_legs_of_a_name_without_a_url_are_refused() -> None:
    with pytest.raises(ValueError, match="--legs of two: there is no --url of that name"):
        user_run(["one=http://h:1"], ["two=http://h:2,http://h:3"])


def test_a_server_of_the_users_that_is_not_there_is_a_set_up_that_failed(tmp_path: Path) -> None:
    place = Place(tmp_path, tmp_path, Console())
    with (
        pytest.raises(SetupFailed, match="refused"),
        user_run([f"mine=http://127.0.0.1:{free_port()}"], [])[0].open(place),
    ):
        pass
