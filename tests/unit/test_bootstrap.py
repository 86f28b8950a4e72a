from __future__ import annotations

import asyncio
import json
import socket
from typing import TYPE_CHECKING, Any, TypeVar

import aiohttp
import pytest

from mooncake_connector.bootstrap import (
    BootstrapError,
    BootstrapServer,
    EngineEntry,
    Registration,
    decode_query,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

T = TypeVar("T")

WORKERS = {0: "127.0.0.1:7000", 1: "127.0.0.1:7001"}


def server(port: int = 0, *, accept_registrations: bool = False) -> BootstrapServer:
    return BootstrapServer(
        "127.0.0.1",
        port,
        engine_id="engine-a",
        worker_addresses=WORKERS,
        accept_registrations=accept_registrations,
    )


def serve(
    check: Callable[[aiohttp.ClientSession, str], Awaitable[T]],
    *,
    accept_registrations: bool = False,
) -> T:
    async def run() -> T:
        running = server(accept_registrations=accept_registrations)
        await running.start()
        try:
            async with aiohttp.ClientSession() as session:
                return await check(session, f"http://127.0.0.1:{running.port}")
        finally:
            await running.stop()
            await running.stop()

    return asyncio.run(run())


async def query(session: aiohttp.ClientSession, url: str) -> bytes:
    async with session.get(url + "/query") as response:
        assert response.status == 200
        assert response.content_type == "application/json"
        return await response.read()


def test_the_reply_has_the_form_of_vllms_bootstrap() -> None:
    assert json.loads(serve(query)) == {
        "0": {
            "engine_id": "engine-a",
            "worker_addr": {"0": {"0": "127.0.0.1:7000"}, "1": {"0": "127.0.0.1:7001"}},
        }
    }


def test_the_reply_can_be_decoded_again() -> None:
    assert decode_query("http://x", serve(query)) == {
        0: EngineEntry("engine-a", {0: {0: "127.0.0.1:7000"}, 1: {0: "127.0.0.1:7001"}})
    }


def test_another_engine_of_the_group_registers_itself() -> None:
    async def check(session: aiohttp.ClientSession, url: str) -> list[Any]:
        body = {"engine_id": "b", "dp_rank": 1, "tp_rank": 0, "pp_rank": 0, "addr": "h:1"}
        seen: list[Any] = []
        for change in ({}, {}, {"addr": "h:2"}, {"engine_id": "c"}, {"dp_rank": "one"}):
            async with session.post(url + "/register", json=body | change) as response:
                seen.append((response.status, await response.json()))
        return [*seen, json.loads(await query(session, url))]

    first, again, moved, other, malformed, engines = serve(check, accept_registrations=True)
    assert first == again == (200, {"status": "ok"})
    assert moved[0] == other[0] == malformed[0] == 400
    assert "cannot also be at h:2" in moved[1]["detail"]
    assert "is engine b, not c" in other[1]["detail"]
    assert engines["1"] == {"engine_id": "b", "worker_addr": {"0": {"0": "h:1"}}}


def test_nobody_registers_unless_it_was_allowed() -> None:
    async def check(session: aiohttp.ClientSession, url: str) -> int:
        async with session.post(url + "/register", json={}) as response:
            return response.status

    assert serve(check) == 404


def test_a_taken_port_is_named_and_nothing_stays_open() -> None:
    async def start(port: int) -> None:
        await server(port).start()

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BootstrapError, match=f"127.0.0.1:{port}: the port is taken"):
            asyncio.run(start(port))


def test_a_port_is_free_again_after_stop() -> None:
    async def twice() -> None:
        first = server()
        await first.start()
        await first.stop()
        second = server(first.port)
        await second.start()
        await second.stop()

    asyncio.run(twice())


def test_one_rank_cannot_be_two_workers() -> None:
    with pytest.raises(BootstrapError, match=r"tp=0 pp=0 is at 127\.0\.0\.1:7000"):
        server().register(Registration("engine-a", 0, 0, 0, "127.0.0.1:9"))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"<html>", "did not answer as a bootstrap server does"),
        (b'{"0": {"engine_id": 3, "worker_addr": {}}}', "did not answer"),
        (b'{"0": {"engine_id": "a", "worker_addr": {"x": {}}}}', "did not answer"),
        (b"{}", "knows no prefill engine yet"),
    ],
)
def test_a_reply_of_another_form_is_refused_with_its_url(body: bytes, reason: str) -> None:
    with pytest.raises(BootstrapError, match=f"http://p:8998.*{reason}"):
        decode_query("http://p:8998", body)
