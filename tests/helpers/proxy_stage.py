"""A proxy between real HTTP servers that stand where vLLM's would, for the proxy's tests."""

from __future__ import annotations

import asyncio
import json
import uuid
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from aiohttp import web
from harness.servers import free_port
from mooncake_engine.config import MetadataConfig
from mooncake_engine.metadata import open_store

from mooncake_connector.bootstrap import BootstrapServer
from mooncake_connector.cluster import NodeRecord
from mooncake_connector.proxy import Proxy, ProxyConfig

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from mooncake_engine.metadata.base import MetadataStore

    from mooncake_connector.cluster import Role

both_styles = pytest.mark.parametrize("style", ["prefill-first", "both-at-once"])

DEADLINE_S = 20.0  # of a whole test; each takes well under a second on a free core
PARAMS = {"do_remote_prefill": True, "transfer_id": "t", "remote_endpoints": ["h:1"], "x": [None]}
ASK = {"model": "m", "prompt": [1, 2, 3], "max_tokens": 8}
#: Pieces of a stream that are no more than bytes to the proxy.
SSE = [b'data: {"choices":[{"text":"\xc3\xa9"}]}\n\n', b": a comment\n\n", b"data: [DONE]\n\n"]


class StandIn:
    """Records what it is asked, and answers what it was told to."""

    def __init__(self, answer: dict[str, Any]) -> None:
        self.healthy = True
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.arrived = asyncio.Event()
        self.left = asyncio.Event()  # somebody went away before the answer
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.respond: Callable[[web.Request], Awaitable[web.StreamResponse]] = self._json
        self.answer = answer
        self.port = 0
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def fail(self, status: int) -> None:
        async def respond(_request: web.Request) -> web.StreamResponse:
            return web.json_response({"error": {"message": "no", "code": status}}, status=status)

        self.respond = respond

    def stream(self, pieces: list[bytes], *, then_die: bool = False) -> None:
        async def respond(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            for piece in pieces:
                await response.write(piece)
            if then_die:
                assert request.transport is not None
                request.transport.close()
            return response

        self.respond = respond

    def die(self) -> None:
        async def respond(request: web.Request) -> web.StreamResponse:
            assert request.transport is not None
            request.transport.close()
            return web.Response()

        self.respond = respond

    async def start(self) -> None:
        app = web.Application()
        app.router.add_get("/health", self._health)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _health(self, _request: web.Request) -> web.Response:
        return web.Response(status=200 if self.healthy else 503)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        self.bodies.append(json.loads(raw) if raw else {"GET": request.path})
        self.headers.append(request.headers)
        self.arrived.set()
        try:
            await self.may_answer.wait()
        except asyncio.CancelledError:
            self.left.set()
            raise
        return await self.respond(request)

    async def _json(self, _request: web.Request) -> web.StreamResponse:
        return web.json_response(self.answer, headers={"X-Of-The-Server": "kept"})


class Stage:
    """Two prefill and two decode servers, of which one each is used unless the other fails."""

    def __init__(self) -> None:
        self.prefill = StandIn({"choices": [], "kv_transfer_params": PARAMS})
        self.decode = StandIn({"choices": [{"text": "d"}]})
        self.client: aiohttp.ClientSession
        self.proxy: Proxy
        self.bootstrap: BootstrapServer

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.proxy.port}"

    async def ask(
        self, body: object = ASK, path: str = "/v1/completions", **headers: str
    ) -> tuple[int, Any, Any]:
        async with self.client.post(self.url + path, json=body, headers=headers) as reply:
            return reply.status, await reply.json(), reply.headers

    async def get(self, path: str) -> tuple[int, str]:
        async with self.client.get(self.url + path) as reply:
            return reply.status, await reply.text()

    async def counted(self, sample: str) -> float:
        _, text = await self.get("/metrics")
        found = [line for line in text.splitlines() if line.startswith(sample + " ")]
        return float(found[0].split()[-1]) if found else 0.0

    async def health(self, **wanted: int) -> None:
        """Wait until `/health` says so."""

        async def says_so() -> bool:
            _, text = await self.get("/health")
            return all(json.loads(text)[key] == value for key, value in wanted.items())

        await until(says_so)

    async def count(self, sample: str, value: float) -> None:
        """Wait until `/metrics` says so."""

        async def says_so() -> bool:
            return await self.counted(sample) == value

        await until(says_so)

    async def idle(self) -> None:
        """Wait until no leg is in flight."""
        for server in (self.prefill, self.decode):
            await self.count(f'mooncake_proxy_in_flight{{server="{server.url}"}}', 0)


def staged(
    play: Callable[[Stage], Awaitable[None]],
    *,
    more_prefill: tuple[str, ...] = (),
    more_decode: tuple[str, ...] = (),
    **config: Any,  # noqa: ANN401 # fields of ProxyConfig, which checks them
) -> None:
    """Run `play` before a proxy that has found its servers; then nothing may be left open."""

    async def run() -> None:
        async with AsyncExitStack() as stack, asyncio.timeout(DEADLINE_S):
            stage = Stage()
            for server in (stage.prefill, stage.decode):
                await server.start()
                stack.push_async_callback(server.stop)
            stage.bootstrap = BootstrapServer(
                "127.0.0.1", 0, engine_id="e", worker_addresses={0: "h:1"}
            )
            await stage.bootstrap.start()
            stack.push_async_callback(stage.bootstrap.stop)
            stage.client = await stack.enter_async_context(aiohttp.ClientSession())
            stage.proxy = Proxy(
                ProxyConfig(
                    port=0,
                    prefill=(f"{stage.prefill.url},{stage.bootstrap.port}", *more_prefill),
                    decode=(stage.decode.url, *more_decode),
                    **config,
                )
            )
            await stage.proxy.start()
            stack.push_async_callback(stage.proxy.stop)
            await stage.health(prefill_in=1, decode_in=1)
            await play(stage)
            await stage.idle()
        await stage.proxy.stop()
        assert asyncio.all_tasks() == {asyncio.current_task()}, "the proxy left a task behind"

    before = open_descriptors()
    asyncio.run(run())
    assert open_descriptors() == before


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Look again and again; the test's deadline ends it."""
    while not await holds():  # noqa: ASYNC110 # what is waited for is seen from outside only
        await asyncio.sleep(0.01)


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def unused_url() -> str:
    """Where nobody listens, nor a server of the stage's will."""
    return f"http://127.0.0.1:{free_port()}"


def record(engine_id: str, role: Role, url: str, dp_rank: int = 0) -> NodeRecord:
    return NodeRecord(
        engine_id=engine_id,
        rank=0,
        tp_size=1,
        role=role,
        control=f"{engine_id}:1",
        incarnation=f"{engine_id}-started",
        framework="vllm",
        version="0.32.0",
        http_url=url,
        dp_rank=dp_rank,
    )


def watched(
    play: Callable[[Stage, MetadataStore], Awaitable[None]],
    store: MetadataStore | None = None,
    **config: Any,  # noqa: ANN401 # as above
) -> None:
    """Run `play` before a proxy that knows its servers from a metadata store only."""

    async def run() -> None:
        async with AsyncExitStack() as stack, asyncio.timeout(DEADLINE_S):
            stage = Stage()
            for server in (stage.prefill, stage.decode):
                await server.start()
                stack.push_async_callback(server.stop)
            stage.client = await stack.enter_async_context(aiohttp.ClientSession())
            known = store
            if known is None:
                known = open_store(MetadataConfig(backend="memory", cluster=uuid.uuid4().hex), "")
                stack.callback(known.close)
            stage.proxy = Proxy(ProxyConfig(port=0, **config), known)
            await stage.proxy.start()
            stack.push_async_callback(stage.proxy.stop)
            await play(stage, known)
            await stage.idle()
        assert asyncio.all_tasks() == {asyncio.current_task()}, "the proxy left a task behind"

    asyncio.run(run())
