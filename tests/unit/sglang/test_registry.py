"""The bootstrap server's routes over real HTTP, without SGLang."""

from __future__ import annotations

import asyncio
import io
import json
from typing import TYPE_CHECKING, Any, TypeVar

import aiohttp
import pytest
from aiohttp import web
from route_rows import ALL, body, place, query, record, server

from mooncake_connector.cluster import node_key
from mooncake_connector.sglang.registry import MAX_BODY_BYTES, Registry

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

T = TypeVar("T")
KEYS = [node_key("127.0.0.1:8998", rank) for rank in range(4)]


class Client:
    """Asks a registry, and answers with the status and the body."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def put(self, row: object) -> tuple[int, str]:
        return await self.send("PUT", "/route", json.dumps(row))

    async def topology(self) -> tuple[int, Any]:
        return await self.rank(ALL)

    async def rank(self, position: tuple[int, int, int, int]) -> tuple[int, Any]:
        async with self._session.get("/route", params=query(position)) as answer:
            text = await answer.text()
            return answer.status, json.loads(text) if answer.status == 200 else text

    async def send(
        self, method: str, path: str, data: bytes | str | io.BytesIO = b""
    ) -> tuple[int, str]:
        async with self._session.request(method, path, data=data) as answer:
            return answer.status, await answer.text()


def by_put(room_lifetime_s: float = 60.0) -> Registry:
    return Registry(room_lifetime_s=room_lifetime_s, from_store=False)


def from_store() -> Registry:
    return Registry(room_lifetime_s=60.0, from_store=True)


def ask(play: Callable[[Client], Awaitable[T]], registry: Registry | None = None) -> T:
    """Run `play` against a registry that serves on a port of its own."""

    async def run() -> T:
        runner = web.AppRunner((registry or by_put()).app(), shutdown_timeout=0.5)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port = runner.addresses[0][1]
        try:
            async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
                return await asyncio.wait_for(play(Client(session)), 20)
        finally:
            await runner.cleanup()

    return asyncio.run(run())


def test_ranks_register_and_are_found_when_all_are_there() -> None:
    first, second = server(2)

    async def play(client: Client) -> None:
        assert await client.topology() == (503, "no prefill rank has registered yet")
        assert await client.put(first) == (200, "OK")
        assert await client.topology() == (503, "1 of 2 prefill ranks have registered")
        assert (await client.rank((0, 0, 0, 0)))[0] == 503
        assert await client.put(second) == (200, "OK")
        status, topology = await client.topology()
        assert (status, topology["attn_tp_size"]) == (200, 2)
        assert await client.rank((0, 0, 1, 0)) == (200, place(second))
        status, why = await client.rank((0, 0, 7, 0))
        assert status == 404
        assert "target_tp_rank=7" in why

    ask(play)


def test_a_contradicting_rank_may_try_again() -> None:
    first, second = server(2)

    async def play(client: Client) -> None:
        await client.put(first)
        status, why = await client.put(second | {"page_size": 16})
        assert status == 409
        assert "page_size is 64 in prefill rank 0 (127.0.0.1) and 16 in rank 1" in why
        assert (await client.put(second))[0] == 200

    ask(play)


@pytest.mark.parametrize(
    ("method", "path", "data", "reason"),
    [
        ("PUT", "/route", b"", "cannot use this body"),
        ("PUT", "/route", b"\xff\xfe{}", "cannot use this body"),
        ("PUT", "/route", b"[" * 100_000, "cannot use this body"),
        ("PUT", "/route", b"{}", "missing required field"),
        ("PUT", "/route", json.dumps(body(attn_tp_rank=5)), "tensor-parallel rank 5"),
        ("PUT", "/route", json.dumps(body(rank_port=[1])), "rank_port"),
        ("GET", "/route", b"", "whole number for each of prefill_dp_rank"),
        ("GET", "/route?prefill_dp_rank=x", b"", "whole number"),
        ("POST", "/register_dp_rank", b"{}", "bootstrap_room"),
        ("POST", "/register_dp_rank", b'{"bootstrap_room": Infinity, "dp_rank": 0}', "body"),
        ("POST", "/register_dp_rank", b'{"bootstrap_room": 1, "dp_rank": -1}', "dp_rank"),
        ("POST", "/query_dp_ranks", b'{"bootstrap_rooms": 7}', "bootstrap_rooms"),
        ("POST", "/query_dp_ranks", b'{"bootstrap_rooms": [null]}', "bootstrap_rooms"),
        ("POST", "/query_dp_ranks", b'{"a":' + b"[" * 100_000, "cannot use this body"),
    ],
)
def test_a_bad_request_gets_a_sentence_and_the_next_one_is_served(
    method: str, path: str, data: bytes | str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def play(client: Client) -> None:
        status, why = await client.send(method, path, data)
        assert status == 400, why
        assert reason in why
        assert (await client.put(body()))[0] == 200

    ask(play)
    assert not caplog.records, "a traceback of somebody else's mistake"


def test_a_body_without_end_is_refused() -> None:
    async def play(client: Client) -> None:
        endless = io.BytesIO(b" " * (MAX_BODY_BYTES + 1))
        assert (await client.send("PUT", "/route", endless))[0] == 413

    ask(play)


def test_other_methods_are_not_allowed() -> None:
    async def play(client: Client) -> None:
        assert (await client.send("DELETE", "/route"))[0] == 405
        assert (await client.send("GET", "/query_dp_ranks"))[0] == 405

    ask(play)


def test_a_row_in_the_store_comes_changes_and_goes() -> None:
    registry = from_store()
    first, second = server(2)

    async def play(client: Client) -> None:
        registry.on_record(KEYS[0], record(first))
        registry.on_record(KEYS[1], record(second))
        assert await client.rank((0, 0, 1, 0)) == (200, place(second))
        registry.on_record(KEYS[1], None)
        assert await client.topology() == (503, "1 of 2 prefill ranks have registered")
        moved = second | {"rank_port": 7777, "incarnation": "later"}
        registry.on_record(KEYS[1], record(moved))
        assert await client.rank((0, 0, 1, 0)) == (200, place(moved))

    ask(play, registry)


def test_rows_in_the_store_that_contradict_each_other_are_named_to_decode() -> None:
    registry = from_store()
    first, second = server(2)

    async def play(client: Client) -> None:
        registry.on_record(KEYS[0], record(first))
        registry.on_record(KEYS[1], record(second | {"page_size": 16}))
        status, why = await client.topology()
        assert status == 503
        assert "1 of 2 prefill ranks have registered; page_size is 64" in why

    ask(play, registry)


def test_a_server_restarted_on_fewer_ranks_serves_before_the_old_leases_end() -> None:
    registry = from_store()

    async def play(client: Client) -> None:
        for key, row in zip(KEYS, server(4), strict=True):
            registry.on_record(key, record(row))
        assert (await client.topology())[1]["attn_tp_size"] == 4
        for key, row in zip(KEYS, server(2, incarnation="later"), strict=False):
            registry.on_record(key, record(row))
        assert (await client.topology())[1]["attn_tp_size"] == 2
        for key in KEYS[2:]:
            registry.on_record(key, None)
        assert (await client.topology())[1]["attn_tp_size"] == 2

    ask(play, registry)


@pytest.mark.parametrize(
    "value", [b"\xff", b"{}", record(body() | {"attn_tp_rank": 9}), record(None)]
)
def test_a_record_that_is_no_prefill_ranks_counts_as_none(value: bytes) -> None:
    registry = from_store()

    async def play(client: Client) -> None:
        registry.on_record(KEYS[0], record(body()))
        assert (await client.topology())[0] == 200
        registry.on_record(KEYS[0], value)
        assert await client.topology() == (503, "no prefill rank has registered yet")

    ask(play, registry)


def test_a_rank_that_does_not_publish_where_the_others_do_is_told() -> None:
    async def play(client: Client) -> None:
        status, why = await client.put(body(3, attn_tp_size=4))
        assert status == 400
        assert "reads its ranks from etcd (engine.metadata); start rank 3 at 127.0.0.1" in why
        assert (await client.topology())[0] == 503

    ask(play, from_store())


def test_the_data_parallel_rank_of_a_room_is_answered_until_it_is_old() -> None:
    room = 1 << 62

    async def play(client: Client) -> str:
        data = json.dumps({"bootstrap_room": str(room), "dp_rank": 3})
        assert await client.send("POST", "/register_dp_rank", data) == (200, "OK")
        asked = json.dumps({"bootstrap_rooms": [room, 5]})
        status, answer = await client.send("POST", "/query_dp_ranks", asked)
        assert status == 200
        return answer

    assert json.loads(ask(play)) == {str(room): 3}
    assert json.loads(ask(play, by_put(room_lifetime_s=1e-9))) == {}


def test_it_is_healthy_before_its_ranks_are() -> None:
    async def play(client: Client) -> None:
        assert await client.send("GET", "/health") == (200, "OK")

    ask(play)
