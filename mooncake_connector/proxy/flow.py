"""The ways of one request: prefill first, both at once, and decode alone when those fail.

Everything that is opened is pushed onto an exit stack, so that leaving it (an error, a deadline,
a client that went away) drops every leg; a dropped connection makes vLLM abort the request.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import aiohttp
import msgspec

from mooncake_connector.bootstrap import BootstrapError, decode_query
from mooncake_connector.cluster import Engine
from mooncake_connector.errors import ConnectorError
from mooncake_connector.proxy.leg import Call, Leg, LegFailed, end_task
from mooncake_connector.proxy.protocol import (
    KEEP_KV,
    both_at_once,
    bypass_reason,
    decode_body,
    prefill_body,
    server_failed,
    users_mistake,
)

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from mooncake_connector.proxy.metrics import Metrics
    from mooncake_connector.proxy.pool import Pool, Server

log = logging.getLogger(__name__)

#: The bootstrap server answers from memory; one that needs longer is as good as gone.
BOOTSTRAP_TIMEOUT_S = 5.0


class NoServer(ConnectorError):
    """No server is in that could do it."""


class _PrefillFailed(ConnectorError):
    """Decode has to compute the prompt; `reason` is the metric's label."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Dispatcher:
    """Sends the legs of each call."""

    def __init__(self, session: aiohttp.ClientSession, pool: Pool, metrics: Metrics) -> None:
        self._session = session
        self._pool = pool
        self._metrics = metrics

    async def answer(self, call: Call, stack: AsyncExitStack) -> Leg:
        """The leg whose reply the client gets, with its first bytes there.

        Raises:
            NoServer: No decode server is in.
            LegFailed: Decode cannot be reached any more, or broke off before its first byte.
        """
        assert call.body is not None, "GET goes to any()"
        if reason := bypass_reason(call.body):
            self._metrics.bypassed.labels(reason).inc()
            return await self._decode(call, None, stack)
        flow = self._both_at_once if call.style == "both-at-once" else self._prefill_first
        try:
            async with AsyncExitStack() as attempt:
                leg = await flow(call, attempt)
                if server_failed(leg.status, leg.first):
                    # Nothing reached the client yet, so decode may try once more, without the KV
                    # that it perhaps could not load. Once: a request that kills is not passed on.
                    raise _PrefillFailed("decode_failed", f"{leg.server.url} could not serve it")
                stack.push_async_exit(attempt.pop_all())
                return leg
        except _PrefillFailed as exc:
            request_id = call.headers["X-Request-Id"]
            log.warning("request %s is computed by decode alone: %s", request_id, exc)
            self._metrics.recomputed.labels(exc.reason).inc()
        return await self._decode(call, None, stack)

    async def any(self, call: Call, stack: AsyncExitStack) -> Leg:
        """A GET that every server answers alike, from one that is in.

        Raises:
            NoServer, LegFailed: As `answer`.
        """
        return await self._decode(call, None, stack)

    async def _prefill_first(self, call: Call, stack: AsyncExitStack) -> Leg:
        unreachable: list[Server] = []
        while True:
            server = self._pool.choose("prefill", unreachable)
            if server is None:
                raise _PrefillFailed("no_prefill", "no prefill server is in")
            try:
                reply = await self._prefill(server, call, KEEP_KV, stack)
                break
            except _PrefillFailed as exc:
                if exc.reason != "prefill_unreachable":
                    raise
                unreachable.append(server)  # it got nothing: the next one can have it
        if users_mistake(reply.status):
            return reply
        try:
            params = msgspec.json.decode(await reply.whole()).get("kv_transfer_params")
        except (ValueError, AttributeError, RecursionError, LegFailed) as exc:
            raise _PrefillFailed("prefill_failed", f"{server.url} replied no JSON: {exc}") from exc
        reply.close()
        if not isinstance(params, dict):
            raise _PrefillFailed("no_params", f"{server.url} returned no kv_transfer_params")
        return await self._decode(call, params, stack)

    async def _both_at_once(self, call: Call, stack: AsyncExitStack) -> Leg:
        server = self._pool.choose("prefill")
        if server is None:
            raise _PrefillFailed("no_prefill", "no prefill server is in")
        engine, rank = await self._engine(server)
        for_prefill, for_decode = both_at_once(
            f"xfer-{uuid.uuid4().hex}", engine, server.listing.bootstrap
        )
        prefill = _start(self._prefill(server, call, for_prefill, stack, rank), stack)
        decode = _start(self._decode(call, for_decode, stack), stack)
        await asyncio.wait({prefill, decode}, return_when=asyncio.FIRST_COMPLETED)
        if decode.done():  # it had the prompt cached, or says why it cannot serve the request
            return decode.result()
        reply = prefill.result()  # when it failed, leaving the stack cancels the decode leg
        return reply if users_mistake(reply.status) else await decode

    async def _engine(self, server: Server) -> tuple[Engine, dict[str, str]]:
        """An engine behind `server`, and the header that makes the server use that one."""
        listing = server.listing
        engines = listing.engines
        if not engines:
            # Asked each time: 1 ms, and a prefill server that came back has another engine id.
            timeout = aiohttp.ClientTimeout(total=BOOTSTRAP_TIMEOUT_S)
            url = f"{listing.bootstrap}/query"
            try:
                async with self._session.get(url, timeout=timeout) as reply:
                    known = decode_query(url, await reply.read())
            except (aiohttp.ClientError, OSError, BootstrapError) as exc:
                raise _PrefillFailed("no_bootstrap", f"{url}: {exc or type(exc).__name__}") from exc
            engines = tuple(Engine(known[rank].engine_id, rank, (), ()) for rank in sorted(known))
        engine = engines[server.times_chosen % len(engines)]
        if len(engines) == 1:
            return engine, {}
        return engine, {"X-Data-Parallel-Rank": str(engine.dp_rank)}

    async def _prefill(
        self,
        server: Server,
        call: Call,
        params: dict[str, Any],
        stack: AsyncExitStack,
        headers: dict[str, str] | None = None,
    ) -> Leg:
        """Prefill's reply: it did it, or the request is the client's mistake."""
        assert call.body is not None, "only POST has a prompt"
        body = prefill_body(call.body, call.overrides | params)
        try:
            leg = await self._send(server, call, body, stack, headers)
            if not users_mistake(leg.status) and leg.status != 200:
                said = (await leg.whole())[:500].decode(errors="replace")
                raise _PrefillFailed("prefill_failed", f"{server.url}: {leg.status} {said}")
        except LegFailed as exc:
            reason = "prefill_failed" if exc.sent else "prefill_unreachable"
            raise _PrefillFailed(reason, str(exc)) from exc
        return leg

    async def _decode(
        self, call: Call, params: dict[str, Any] | None, stack: AsyncExitStack
    ) -> Leg:
        """Decode's reply, from the first decode server that can be reached."""
        body = call.body
        if body is not None:
            body = decode_body(body, None if params is None else call.overrides | params)
        unreachable: list[Server] = []
        while True:
            server = self._pool.choose("decode", unreachable)
            if server is None:
                known = self._pool.count("decode", up=False)
                raise NoServer(f"no decode server is in ({known} known, but not healthy)")
            try:
                return await self._send(server, call, body, stack)
            except LegFailed as exc:
                # A server that may have begun is not repeated elsewhere: a request that kills
                # its server would kill one after the other.
                if exc.sent:
                    raise
                unreachable.append(server)

    async def _send(
        self,
        server: Server,
        call: Call,
        body: dict[str, Any] | None,
        stack: AsyncExitStack,
        headers: dict[str, str] | None = None,
    ) -> Leg:
        leg = Leg(server)
        stack.callback(leg.close)
        call.legs.append(leg)
        try:
            await leg.open(self._session, call, body, headers)
        except LegFailed as exc:
            leg.close()
            self._pool.suspect(server, str(exc))
            raise
        return leg


def _start(leg: Coroutine[Any, Any, Leg], stack: AsyncExitStack) -> asyncio.Task[Leg]:
    task = asyncio.get_running_loop().create_task(leg)
    stack.push_async_callback(end_task, task)
    return task
