"""The HTTP that clients see."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import pytest
from mooncake_engine.config import MetadataConfig
from mooncake_engine.errors import ConfigError
from proxy_stage import ASK, Stage, open_descriptors, staged

from mooncake_connector.proxy import Proxy, ProxyConfig, serve


def test_headers_pass_both_ways_and_the_request_id_is_kept() -> None:
    async def play(stage: Stage) -> None:
        sent = {"X-Request-Id": "r-1", "Authorization": "Bearer k", "Traceparent": "t"}
        _, _, headers = await stage.ask(**sent)
        for server in (stage.prefill, stage.decode):
            assert {key: server.headers[0][key] for key in sent} == sent
        assert headers["X-Request-Id"] == "r-1"
        assert headers["X-Of-The-Server"] == "kept"

    staged(play)


def test_a_request_without_an_id_gets_one_that_all_legs_share() -> None:
    async def play(stage: Stage) -> None:
        _, _, headers = await stage.ask()
        made = headers["X-Request-Id"]
        assert len(made) == 32
        assert stage.prefill.headers[0]["X-Request-Id"] == made
        assert stage.decode.headers[0]["X-Request-Id"] == made

    staged(play)


@pytest.mark.parametrize("prompt", [[1, 2], [[1], [2]]])
def test_a_client_cannot_tell_decode_where_to_read_from(prompt: list[Any]) -> None:
    async def play(stage: Stage) -> None:
        mine = {"remote_endpoints": ["10.0.0.1:1"], "mine": 1}
        await stage.ask(ASK | {"prompt": prompt, "kv_transfer_params": mine})
        for body in stage.prefill.bodies + stage.decode.bodies:
            assert "mine" not in body.get("kv_transfer_params", {})

    staged(play)


def test_with_overrides_a_test_chooses_style_and_path_per_request() -> None:
    async def play(stage: Stage) -> None:
        mine = {"test_protocol": "tcp", "do_remote_decode": False}
        headers = {"X-Mooncake-Style": "both-at-once"}
        await stage.ask(ASK | {"kv_transfer_params": mine}, **headers)
        for server, asked in ((stage.prefill, True), (stage.decode, False)):
            params = server.bodies[0]["kv_transfer_params"]
            assert params["test_protocol"] == "tcp"
            assert params["transfer_id"].startswith("xfer-")
            assert params["do_remote_decode"] is asked
        status, answer, _ = await stage.ask(**{"X-Mooncake-Style": "sideways"})
        assert status == 400
        assert "'sideways'" in answer["error"]["message"]

    staged(play, allow_overrides=True)


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b'"\xff"', b"[" * 5000])
def test_what_is_no_request_is_refused_and_reaches_nobody(raw: bytes) -> None:
    async def play(stage: Stage) -> None:
        async with stage.client.post(stage.url + "/v1/completions", data=raw) as reply:
            assert reply.status == 400
            assert (await reply.json())["error"]["type"] == "BadRequestError"
        assert (stage.prefill.bodies, stage.decode.bodies) == ([], [])

    staged(play)


def test_a_request_that_is_too_long_is_refused_in_json() -> None:
    async def play(stage: Stage) -> None:
        status, answer, _ = await stage.ask(ASK | {"prompt": "a" * 2000})
        assert (status, answer["error"]["code"]) == (413, 413)

    staged(play, max_body_bytes=1024)


def test_an_unknown_path_is_a_404_in_json() -> None:
    async def play(stage: Stage) -> None:
        status, answer, _ = await stage.ask(path="/v1/embeddings")
        assert status == 404
        assert "POST /v1/embeddings" in answer["error"]["message"]

    staged(play)


def test_models_are_those_of_decode() -> None:
    async def play(stage: Stage) -> None:
        status, text = await stage.get("/v1/models")
        assert (status, json.loads(text)) == (200, stage.decode.answer)
        assert stage.decode.bodies == [{"GET": "/v1/models"}]

    staged(play)


def test_a_taken_port_is_said_and_nothing_stays_open() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        before = open_descriptors()
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
            asyncio.run(Proxy(ProxyConfig(port=port)).start())
        assert open_descriptors() == before


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"prefill": ("127.0.0.1:8100",)}, "prefill is '127.0.0.1:8100'"),
        ({"prefill": ("http://p:1,x",)}, "bootstrap port"),
        ({"decode": ("http://",)}, "decode is 'http://'"),
        ({"decode": ("http://d:port",)}, "decode is 'http://d:port'"),
    ],
)
def test_what_is_no_url_is_refused_by_name(given: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Proxy(ProxyConfig(**given))


def test_a_proxy_with_nobody_behind_it_does_not_start() -> None:
    with pytest.raises(ConfigError, match="nobody to send requests to"):
        serve(ProxyConfig(), MetadataConfig(backend="p2p"))
