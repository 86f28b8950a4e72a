"""What the two legs of a request carry, and when they run."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import web
from proxy_stage import ASK, PARAMS, SSE, Stage, both_styles, staged


def test_prefill_first_hands_prefills_params_to_decode_unchanged() -> None:
    async def play(stage: Stage) -> None:
        status, answer, _ = await stage.ask()
        assert (status, answer) == (200, stage.decode.answer)
        assert stage.prefill.bodies == [
            ASK
            | {
                "max_tokens": 1,
                "stream": False,
                "kv_transfer_params": {
                    "do_remote_decode": True,
                    "do_remote_prefill": False,
                    "remote_engine_id": None,
                    "remote_block_ids": None,
                    "remote_host": None,
                    "remote_port": None,
                },
            }
        ]
        assert stage.decode.bodies == [ASK | {"kv_transfer_params": PARAMS}]

    staged(play)


def test_both_legs_run_at_the_same_time_and_share_a_transfer_id() -> None:
    async def play(stage: Stage) -> None:
        stage.prefill.may_answer.clear()
        stage.decode.may_answer.clear()
        asking = asyncio.create_task(stage.ask())
        await stage.prefill.arrived.wait()
        await stage.decode.arrived.wait()
        stage.prefill.may_answer.set()
        stage.decode.may_answer.set()
        assert (await asking)[:2] == (200, stage.decode.answer)
        for_prefill = stage.prefill.bodies[0]["kv_transfer_params"]
        transfer_id = for_prefill["transfer_id"]
        assert transfer_id.startswith("xfer-")
        assert for_prefill["do_remote_decode"] is True
        assert stage.decode.bodies[0]["kv_transfer_params"] == {
            "do_remote_decode": False,
            "do_remote_prefill": True,
            "transfer_id": transfer_id,
            "remote_bootstrap_addr": f"http://127.0.0.1:{stage.bootstrap.port}",
            "remote_engine_id": "e",
        }

    staged(play, style="both-at-once")


def test_decode_that_has_the_prompt_cached_does_not_wait_for_prefill() -> None:
    async def play(stage: Stage) -> None:
        stage.prefill.may_answer.clear()
        assert (await stage.ask())[0] == 200
        await stage.prefill.left.wait()

    staged(play, style="both-at-once")


@both_styles
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_passes_byte_for_byte(style: str, path: str) -> None:
    async def play(stage: Stage) -> None:
        stage.decode.stream(SSE)
        async with stage.client.post(stage.url + path, json=ASK | {"stream": True}) as reply:
            assert reply.headers["Content-Type"] == "text/event-stream"
            assert await reply.read() == b"".join(SSE)
        assert stage.prefill.bodies[0]["stream"] is False
        assert stage.decode.bodies[0]["stream"] is True

    staged(play, style=style)


def test_the_first_piece_of_a_stream_comes_before_the_last_is_made() -> None:
    async def play(stage: Stage) -> None:
        goes_on = asyncio.Event()

        async def respond(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse()
            await response.prepare(request)
            await response.write(b"first")
            await goes_on.wait()
            await response.write(b"last")
            return response

        stage.decode.respond = respond
        async with stage.client.post(stage.url + "/v1/completions", json=ASK) as reply:
            assert await reply.content.readany() == b"first"
            goes_on.set()
            assert await reply.read() == b"last"

    staged(play)


@both_styles
def test_several_prompts_of_one_call_are_left_to_decode(style: str) -> None:
    async def play(stage: Stage) -> None:
        body = ASK | {"prompt": [[1], [2]]}
        assert (await stage.ask(body))[0] == 200
        assert (stage.prefill.bodies, stage.decode.bodies) == ([], [body])
        assert await stage.counted('mooncake_proxy_bypassed_total{reason="several_prompts"}') == 1

    staged(play, style=style)
