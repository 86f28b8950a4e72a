"""One request of the proxy to one server, and which headers travel with it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import aiohttp
import msgspec
from multidict import CIMultiDict, CIMultiDictProxy

from mooncake_connector.errors import ConnectorError

if TYPE_CHECKING:
    from mooncake_connector.proxy.pool import Server

#: Headers about one connection, not about the request (RFC 9110, 7.6.1), and those that the
#: proxy writes itself. Accept-Encoding: replies are read and passed on as they are, unpacked.
_NOT_FORWARDED = frozenset({
    "accept-encoding", "connection", "content-length", "content-type", "expect", "host",
    "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
    "transfer-encoding", "upgrade", "x-request-id",
})  # fmt: skip
#: What of these belongs to the body that a reply carries.
_OF_THE_BODY = frozenset({"content-length", "content-type"})


class LegFailed(ConnectorError):
    """A server gave no reply. `sent`: whether it may have begun to work on the request."""

    def __init__(self, server: Server, message: str, *, sent: bool) -> None:
        super().__init__(f"{server.url} {message}")
        self.server = server
        self.sent = sent


class Call(msgspec.Struct):
    """A client's request: what every leg of it sends. `body` is None for GET."""

    path: str
    headers: CIMultiDict[str]
    body: dict[str, Any] | None
    style: str
    overrides: dict[str, Any]  # kv_transfer_params of the client, where they are allowed
    legs: list[Leg]


class Leg:
    """One exchange with one server, counted as in flight until `close`.

    `status`, `headers` and `first`, the body's first bytes (b"" when it has none), are there
    after `open`. Waiting for a byte, not for the status, is what tells that the server is at
    work: vLLM sends the status of a stream before its engine has begun.
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self.status = 0
        self.headers: CIMultiDict[str] = CIMultiDict()
        self.first = b""
        self._reply: aiohttp.ClientResponse | None = None
        self._open = True
        server.in_flight += 1

    async def open(
        self,
        session: aiohttp.ClientSession,
        call: Call,
        body: dict[str, Any] | None,
        extra: dict[str, str] | None = None,
    ) -> None:
        """Send and wait for the first bytes. Without a deadline: the caller has one.

        Raises:
            LegFailed: No connection, or it broke.
        """
        headers = call.headers.copy()
        headers.update(extra or {})
        data = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            data = msgspec.json.encode(body)
        method = "GET" if body is None else "POST"
        url = self.server.url + call.path
        try:
            self._reply = await session.request(method, url, data=data, headers=headers)
            self.status = self._reply.status
            self.headers = end_to_end(self._reply.headers, of_body=True)
            self.first = await self._reply.content.readany()
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as exc:
            raise LegFailed(self.server, f"cannot be reached: {exc}", sent=False) from exc
        except (aiohttp.ClientError, OSError) as exc:
            raise LegFailed(self.server, f"broke off: {_say(exc)}", sent=True) from exc

    async def next(self) -> bytes:
        """The bytes that came after the last ones; b"" at the end.

        Raises:
            LegFailed: The connection broke.
        """
        assert self._reply is not None, "open first"
        try:
            return await self._reply.content.readany()
        except (aiohttp.ClientError, OSError) as exc:
            raise LegFailed(self.server, f"broke off: {_say(exc)}", sent=True) from exc

    async def whole(self) -> bytes:
        """The whole body; it becomes `first`, so that the leg can still be passed on."""
        parts = [self.first]
        while part := await self.next():
            parts.append(part)
        self.first = b"".join(parts)
        return self.first

    def close(self) -> None:
        """Drop the connection, which makes vLLM abort what is still running. Idempotent."""
        if self._open:
            self._open = False
            self.server.in_flight -= 1
        if self._reply is not None:
            self._reply.close()


def end_to_end(
    headers: CIMultiDict[str] | CIMultiDictProxy[str], *, of_body: bool = False
) -> CIMultiDict[str]:
    """The headers that are passed on; with `of_body` those too that describe the body."""
    kept = _NOT_FORWARDED - _OF_THE_BODY if of_body else _NOT_FORWARDED
    listed = {
        name.strip().lower()
        for value in headers.getall("Connection", ())
        for name in value.split(",")
    }
    return CIMultiDict(
        (name, value)
        for name, value in headers.items()
        if name.lower() not in kept and name.lower() not in listed
    )


def _say(exc: Exception) -> str:
    return str(exc) or type(exc).__name__


async def end_task(task: asyncio.Task[Any]) -> None:
    """Cancel a task and wait for its end, whatever that is."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # fetched, or asyncio logs that nobody did
