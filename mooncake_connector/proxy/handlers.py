"""The HTTP side: requests in, answers out byte for byte, errors as OpenAI clients read them."""

from __future__ import annotations

import asyncio
import logging
import uuid
from contextlib import AsyncExitStack
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from mooncake_connector.proxy.config import STYLES
from mooncake_connector.proxy.flow import Dispatcher, NoServer
from mooncake_connector.proxy.leg import Call, Leg, LegFailed, end_to_end
from mooncake_connector.proxy.metrics import Metrics
from mooncake_connector.proxy.pool import JOBS
from mooncake_connector.proxy.protocol import error_body

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import aiohttp

    from mooncake_connector.proxy.config import ProxyConfig
    from mooncake_connector.proxy.pool import Pool

log = logging.getLogger(__name__)

#: With `allow_overrides`: the style of this one request.
STYLE_HEADER = "X-Mooncake-Style"


class Refusal(Exception):
    """An answer of the proxy itself, before any byte of a server's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _HalfAnAnswer(ConnectionResetError):
    """The answer has begun and cannot end well; aiohttp drops the connection for it."""


class Handlers:
    """HTTP in, HTTP out."""

    def __init__(self, config: ProxyConfig, session: aiohttp.ClientSession, pool: Pool) -> None:
        self._config = config
        self._pool = pool
        self._metrics = Metrics(pool)
        self._dispatcher = Dispatcher(session, pool, self._metrics)

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """`POST /v1/completions` and `/v1/chat/completions`."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        outcome = "error"
        try:
            call = self._call(request, _json_object(await request.read()))
            async with AsyncExitStack() as stack:
                leg = await self._first_byte(call, stack)
                self._metrics.first_byte.observe(loop.time() - started)
                response = await self._pass_on(request, call, leg)
                outcome = "ok" if leg.status == HTTPStatus.OK else "refused"
                return response
        except Refusal as exc:
            outcome = "refused" if exc.status < HTTPStatus.INTERNAL_SERVER_ERROR else "error"
            raise
        except web.HTTPRequestEntityTooLarge:
            outcome = "refused"
            raise
        except _HalfAnAnswer:
            raise
        except (asyncio.CancelledError, ConnectionError):
            outcome = "disconnected"
            raise
        finally:
            self._metrics.requests.labels(outcome).inc()

    async def models(self, request: web.Request) -> web.StreamResponse:
        """`GET /v1/models`, as a decode server answers it."""
        call = self._call(request, None)
        async with AsyncExitStack() as stack:
            return await self._pass_on(request, call, await self._first_byte(call, stack))

    async def health(self, _request: web.Request) -> web.Response:
        """`GET /health`: 200 when a prefill and a decode server are in."""
        servers = {
            f"{job}_{'in' if up else 'out'}": self._pool.count(job, up=up)
            for job in JOBS
            for up in (True, False)
        }
        ready = servers["prefill_in"] and servers["decode_in"]
        return web.json_response(servers, status=200 if ready else 503)

    async def metrics(self, _request: web.Request) -> web.Response:
        """`GET /metrics`, for Prometheus."""
        return web.Response(
            body=generate_latest(self._metrics.registry),
            headers={"Content-Type": CONTENT_TYPE_LATEST},
        )

    def _call(self, request: web.Request, body: dict[str, Any] | None) -> Call:
        headers = end_to_end(request.headers)
        headers["X-Request-Id"] = request.headers.get("X-Request-Id") or uuid.uuid4().hex
        style: str = self._config.style
        overrides: dict[str, Any] = {}
        if self._config.allow_overrides:
            style = headers.pop(STYLE_HEADER, style)
            overrides = (body or {}).get("kv_transfer_params") or {}
        if style not in STYLES:
            raise Refusal(400, f"{STYLE_HEADER} is {style!r}, not one of {', '.join(STYLES)}")
        if not isinstance(overrides, dict):
            raise Refusal(400, f"kv_transfer_params is {overrides!r}, not an object")
        return Call(request.path_qs, headers, body, style, overrides, [])

    async def _first_byte(self, call: Call, stack: AsyncExitStack) -> Leg:
        limit = self._config.first_byte_timeout_s
        try:
            async with asyncio.timeout(limit):
                if call.body is None:
                    return await self._dispatcher.any(call, stack)
                return await self._dispatcher.answer(call, stack)
        except NoServer as exc:
            raise Refusal(503, str(exc)) from exc
        except LegFailed as exc:
            raise Refusal(502, str(exc)) from exc
        except TimeoutError as exc:
            silent = [leg.server for leg in call.legs if not leg.first]
            for server in silent:
                self._pool.suspect(server, f"no byte of an answer within {limit:g} s")
            named = ", ".join(dict.fromkeys(server.url for server in silent))
            raise Refusal(504, f"no answer within {limit:g} s from {named}") from exc

    async def _pass_on(self, request: web.Request, call: Call, leg: Leg) -> web.StreamResponse:
        """Byte for byte as they come, no faster than the client reads."""
        response = web.StreamResponse(status=leg.status, headers=leg.headers)
        response.headers["X-Request-Id"] = call.headers["X-Request-Id"]
        await response.prepare(request)
        piece = leg.first
        try:
            while piece:
                async with asyncio.timeout(self._config.stall_timeout_s):
                    await response.write(piece)
                    piece = await leg.next()
        except (LegFailed, TimeoutError) as exc:
            # The status is out; only an answer without its end can say that it is not whole.
            # Aborted, since closing would wait for a client that reads no more.
            what = str(exc) or f"nothing moved for {self._config.stall_timeout_s:g} s"
            log.warning("request %s ends half way: %s", call.headers["X-Request-Id"], what)
            if request.transport is not None:
                request.transport.abort()
            raise _HalfAnAnswer(what) from exc
        await response.write_eof()
        return response


def _json_object(raw: bytes) -> dict[str, Any]:
    try:
        body = msgspec.json.decode(raw)
    except (ValueError, RecursionError) as exc:
        raise Refusal(400, f"the body is not JSON: {exc}") from exc
    if not isinstance(body, dict):
        raise Refusal(400, f"the body is a JSON {type(body).__name__}, not an object")
    return body


@web.middleware
async def errors_as_json(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Whatever goes wrong before an answer has begun becomes an error that clients can parse."""
    try:
        return await handler(request)
    except Refusal as exc:
        status, message = exc.status, str(exc)
    except web.HTTPException as exc:  # of aiohttp: no such path, another method, too long
        status, message = exc.status, f"{request.method} {request.path}: {exc.reason}"
    except ConnectionError:
        raise  # the client is gone; aiohttp ends the exchange
    except Exception:
        log.exception("%s %s failed; this is a bug of the proxy", request.method, request.path)
        status, message = 500, "the proxy failed; its log says why"
    return web.Response(
        status=status, body=error_body(status, message), content_type="application/json"
    )
