"""What is left of a request when a server or the client fails."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from proxy_stage import ASK, SSE, Stage, StandIn, both_styles, staged, until, unused_url


@both_styles
@pytest.mark.parametrize("status", [500, 503, 429])
def test_when_prefill_fails_decode_computes_it_all(style: str, status: int) -> None:
    async def play(stage: Stage) -> None:
        stage.prefill.fail(status)
        if style == "both-at-once":
            stage.decode.may_answer.clear()  # it waits for KV that never comes
            asking = asyncio.create_task(stage.ask())
            await stage.decode.left.wait()
            stage.decode.may_answer.set()
            assert (await asking)[:2] == (200, stage.decode.answer)
            assert "kv_transfer_params" in stage.decode.bodies[0]
        else:
            assert (await stage.ask())[:2] == (200, stage.decode.answer)
        assert stage.decode.bodies[-1] == ASK
        sample = 'mooncake_proxy_recomputed_total{reason="prefill_failed"}'
        assert await stage.counted(sample) == 1

    staged(play, style=style)


@both_styles
def test_when_prefill_breaks_off_decode_computes_it_all(style: str) -> None:
    async def play(stage: Stage) -> None:
        stage.prefill.die()
        stage.decode.may_answer.clear()
        asking = asyncio.create_task(stage.ask())
        if style == "both-at-once":
            await stage.decode.left.wait()
        stage.decode.may_answer.set()
        assert (await asking)[:2] == (200, stage.decode.answer)
        assert stage.decode.bodies[-1] == ASK

    staged(play, style=style)


@both_styles
def test_the_clients_mistake_is_prefills_answer_and_no_recomputation(style: str) -> None:
    async def play(stage: Stage) -> None:
        stage.prefill.fail(400)
        stage.decode.may_answer.clear()
        status, answer, _ = await stage.ask()
        assert (status, answer) == (400, {"error": {"message": "no", "code": 400}})
        assert len(stage.decode.bodies) <= (style == "both-at-once")
        assert await stage.counted('mooncake_proxy_requests_total{outcome="refused"}') == 1

    staged(play, style=style)


def test_a_prefill_server_without_our_connector_is_not_relied_on() -> None:
    async def play(stage: Stage) -> None:
        stage.prefill.answer = {"choices": [], "kv_transfer_params": None}
        assert (await stage.ask())[0] == 200
        assert stage.decode.bodies == [ASK]
        assert await stage.counted('mooncake_proxy_recomputed_total{reason="no_params"}') == 1

    staged(play)


@both_styles
def test_without_any_prefill_server_decode_computes_it_all(style: str) -> None:
    async def play(stage: Stage) -> None:
        await stage.prefill.stop()
        for _ in range(2):  # the first finds out, the second knows
            assert (await stage.ask())[0] == 200
        assert stage.decode.bodies[-1] == ASK
        assert (await stage.get("/health"))[0] == 503

    staged(play, style=style)


def test_a_bootstrap_server_that_is_gone_costs_a_recomputation() -> None:
    async def play(stage: Stage) -> None:
        await stage.bootstrap.stop()
        assert (await stage.ask())[0] == 200
        assert (stage.prefill.bodies, stage.decode.bodies) == ([], [ASK])
        assert await stage.counted('mooncake_proxy_recomputed_total{reason="no_bootstrap"}') == 1

    staged(play, style="both-at-once")


@both_styles
def test_a_decode_server_that_went_is_replaced_with_the_same_kv(style: str) -> None:
    async def play(stage: Stage) -> None:
        other = StandIn({"choices": [{"text": "other"}]})
        other.port = int(spare.rpartition(":")[2])
        await other.start()
        try:
            await stage.health(decode_in=2)
            await stage.decode.stop()
            # Least loaded, then longest unused: of two requests one goes to the server that left.
            answers = [(await stage.ask())[1] for _ in range(2)]
            assert answers == [other.answer] * 2
            assert all("kv_transfer_params" in body for body in other.bodies)
            assert len(stage.prefill.bodies) == 2
        finally:
            await other.stop()

    spare = unused_url()
    staged(play, style=style, more_decode=(spare,))


def test_another_prefill_server_takes_what_the_first_never_got() -> None:
    async def play(stage: Stage) -> None:
        other = StandIn(stage.prefill.answer)
        other.port = int(spare.rpartition(":")[2])
        await other.start()
        try:
            await stage.health(prefill_in=2)
            await stage.prefill.stop()
            for _ in range(2):
                assert (await stage.ask())[0] == 200
            assert len(other.bodies) == 2
            assert all("kv_transfer_params" in body for body in stage.decode.bodies)
        finally:
            await other.stop()

    spare = unused_url()
    staged(play, more_prefill=(spare,))


def test_decode_that_breaks_off_is_a_502_and_the_request_is_not_repeated() -> None:
    async def play(stage: Stage) -> None:
        stage.decode.die()
        status, answer, _ = await stage.ask()
        assert (status, answer["error"]["code"]) == (502, 502)
        assert stage.decode.url in answer["error"]["message"]
        assert len(stage.decode.bodies) == 1

    staged(play)


def test_without_a_decode_server_the_client_is_told() -> None:
    async def play(stage: Stage) -> None:
        await stage.decode.stop()
        status, answer, _ = await stage.ask()
        assert status == 503
        assert answer["error"]["type"] == "ServiceUnavailableError"

    staged(play)


@both_styles
@pytest.mark.parametrize("streamed", [True, False])
def test_decode_that_cannot_load_the_kv_is_asked_once_more_without_it(
    style: str, streamed: bool
) -> None:
    async def play(stage: Stage) -> None:
        good, error = stage.decode.respond, b'data: {"error": {"message": "", "code": 500}}\n\n'

        async def respond(request: web.Request) -> web.StreamResponse:
            if "kv_transfer_params" not in await request.json():
                return await good(request)
            if streamed:
                return web.Response(body=error, content_type="text/event-stream")
            return web.json_response({}, status=500)

        stage.decode.respond = respond
        assert (await stage.ask())[:2] == (200, stage.decode.answer)
        assert await stage.counted('mooncake_proxy_recomputed_total{reason="decode_failed"}') == 1

    staged(play, style=style)


def test_decode_that_fails_twice_answers_for_itself() -> None:
    async def play(stage: Stage) -> None:
        stage.decode.fail(500)
        assert (await stage.ask())[0] == 500
        assert len(stage.decode.bodies) == 2

    staged(play)


def test_an_answer_that_ends_half_way_looks_so_to_the_client() -> None:
    async def play(stage: Stage) -> None:
        stage.decode.stream(SSE[:1], then_die=True)
        async with stage.client.post(stage.url + "/v1/completions", json=ASK) as reply:
            with pytest.raises(aiohttp.ClientError):
                await reply.read()

    staged(play)


@both_styles
def test_a_client_that_goes_away_takes_its_legs_with_it(style: str) -> None:
    async def play(stage: Stage) -> None:
        waiting = [stage.prefill] + [stage.decode] * (style == "both-at-once")
        for server in waiting:
            server.may_answer.clear()
        asking = asyncio.create_task(stage.ask())
        for server in waiting:
            await server.arrived.wait()
        asking.cancel()
        for server in waiting:
            await server.left.wait()
        await stage.count('mooncake_proxy_requests_total{outcome="disconnected"}', 1)

    staged(play, style=style)


def test_a_client_that_goes_away_in_the_middle_of_a_stream_ends_it() -> None:
    async def play(stage: Stage) -> None:
        ended = asyncio.Event()

        async def respond(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse()
            await response.prepare(request)
            await response.write(SSE[0])
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()
            return response

        stage.decode.respond = respond
        async with stage.client.post(stage.url + "/v1/completions", json=ASK) as reply:
            await reply.content.readany()
        await ended.wait()

    staged(play)


@both_styles
def test_a_silent_server_is_a_504_and_has_to_prove_its_health(style: str) -> None:
    async def play(stage: Stage) -> None:
        stage.decode.may_answer.clear()
        stage.decode.healthy = False
        status, answer, _ = await stage.ask()
        assert (status, answer["error"]["type"]) == (504, "TimeoutError")
        assert stage.decode.url in answer["error"]["message"]
        await stage.decode.left.wait()
        await stage.health(decode_in=0)
        stage.decode.healthy = True
        await stage.health(decode_in=1)

    staged(play, style=style, first_byte_timeout_s=0.2)


def test_an_answer_that_stalls_is_cut_off() -> None:
    async def play(stage: Stage) -> None:
        async def respond(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse()
            await response.prepare(request)
            await response.write(SSE[0])
            await asyncio.Event().wait()
            return response

        stage.decode.respond = respond
        async with stage.client.post(stage.url + "/v1/completions", json=ASK) as reply:
            with pytest.raises(aiohttp.ClientError):
                await reply.read()

    staged(play, stall_timeout_s=0.1)


def test_a_client_that_reads_no_more_is_dropped() -> None:
    async def play(stage: Stage) -> None:
        stage.decode.stream([bytes(1 << 20)] * 64)  # more than the sockets' buffers hold
        body = json.dumps(ASK).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: p\r\nContent-Length: {len(body)}\r\n\r\n"
        _, writer = await asyncio.open_connection("127.0.0.1", stage.proxy.port, limit=1)
        try:
            writer.write(head.encode() + body)
            await stage.count('mooncake_proxy_requests_total{outcome="error"}', 1)
            port = writer.get_extra_info("sockname")[1]
            await until(lambda: dropped(stage.proxy.port, port))
        finally:
            writer.transport.abort()

    staged(play, stall_timeout_s=0.1)


async def dropped(local_port: int, remote_port: int) -> bool:
    """Whether the side of `local_port` has given the connection up."""
    return (local_port, remote_port) not in established()


def established() -> set[tuple[int, int]]:
    """Local and remote port of each open connection, as the kernel sees it."""
    rows = [row.split() for row in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
    return {
        (int(local.rpartition(":")[2], 16), int(remote.rpartition(":")[2], 16))
        for _, local, remote, state, *_ in rows
        if state == "01"
    }
