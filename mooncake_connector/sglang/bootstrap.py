"""The HTTP server that tells decode where a prefill server's ranks are, on SGLang's routes.

Ranks register by `PUT /route`, or, when etcd is configured, by their leased record there: then a
rank that died is not offered any more, and this server may restart without its ranks.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import threading
from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web
from mooncake_engine.metadata import open_store
from sglang.srt.disaggregation.common.conn import CommonKVBootstrapServer
from typing_extensions import override

from mooncake_connector.bootstrap import BootstrapError
from mooncake_connector.cluster import decode_node, node_keys, rank_of
from mooncake_connector.errors import WireError
from mooncake_connector.sglang import settings
from mooncake_connector.sglang.routes import RouteTable, decode_row

if TYPE_CHECKING:
    from mooncake_engine.metadata.base import MetadataStore, Watch

log = logging.getLogger(__name__)

_QUERY = ("prefill_dp_rank", "prefill_cp_rank", "target_tp_rank", "target_pp_rank")
_START_S = 10.0
_STOP_S = 5.0


class MooncakeKVBootstrapServer(CommonKVBootstrapServer):
    """Serves on a thread of its own from the constructor on.

    Raises:
        BootstrapError: The port is taken or may not be used.
        MetadataError: etcd is configured and cannot be reached.
    """

    def __init__(self, host: str, port: int) -> None:
        self._table = RouteTable()
        self._lock = threading.Lock()  # guards _table: etcd's rows come on another thread
        self._listener = _listen(host, port)
        self._started = threading.Event()
        self._store: MetadataStore | None = None
        self._watch: Watch | None = None
        config = settings.load()
        super().__init__(host, port)
        if config.engine.metadata.backend == "etcd":
            self._store = open_store(config.engine.metadata, config.engine.host)
            self._watch = self._store.watch(node_keys(settings.engine_id()), self._on_record)
        self._started.wait(_START_S)
        log.info("bootstrap server at http://%s:%d", host, port)

    @override
    def close(self) -> None:
        """Stop serving. Idempotent."""
        if self._watch is not None:
            self._watch.close()
        if self._store is not None:
            self._store.close()
        self._watch = self._store = None
        if self.thread.is_alive():
            self._started.wait(_START_S)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self.thread.join(_STOP_S)

    def _on_record(self, key: str, value: bytes | None) -> None:
        """Etcd's rows, on the watch's thread."""
        with self._lock:
            try:
                if value is None:
                    self._table.remove(rank_of(key))
                elif (route := decode_node(key, value).route) is not None:
                    self._table.add(decode_row(route))
            except WireError as exc:
                log.warning("ignored: %s", exc)

    # ---- the server's thread

    @override
    def _run_server(self) -> None:
        self._loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self._loop)
        self._runner = web.AppRunner(self.app, access_log=None, shutdown_timeout=0.5)
        try:
            self._loop.run_until_complete(self._serve())
            self._loop.run_forever()
            self._loop.run_until_complete(self._runner.cleanup())
        finally:
            for task in asyncio.all_tasks(self._loop):
                task.cancel()
            self._loop.run_until_complete(asyncio.sleep(0))
            self._loop.close()

    async def _serve(self) -> None:
        await self._runner.setup()
        await web.SockSite(self._runner, self._listener).start()
        self._background_tasks.add(asyncio.ensure_future(self._cleanup_expired_entries()))
        self._started.set()

    @override
    async def _handle_route_put(self, request: web.Request) -> web.Response:
        try:
            row = decode_row(await _json(request))
        except WireError as exc:
            return web.Response(text=str(exc), status=400)
        with self._lock:
            self._table.add(row)
        return web.Response(text="OK")

    @override
    async def _handle_route_get(self, request: web.Request) -> web.Response:
        try:
            key = tuple(int(request.query[name]) for name in _QUERY)
        except (KeyError, ValueError):
            return web.Response(text=f"needs the numbers {', '.join(_QUERY)}", status=400)
        with self._lock:
            missing = self._table.missing()
            if missing:
                return web.Response(text=missing, status=503)
            if key == (-1, -1, -1, -1):
                return web.json_response(self._table.topology())
            rank = self._table.rank(key)  # type: ignore[arg-type]  # four of them
        if rank is None:
            named = ", ".join(f"{name}={number}" for name, number in zip(_QUERY, key, strict=True))
            return web.Response(text=f"this prefill server has no {named}", status=404)
        return web.json_response(rank)

    @override
    async def _handle_register_dp_rank(self, request: web.Request) -> web.Response:
        return await _or_400(request, super()._handle_register_dp_rank)

    @override
    async def _handle_query_dp_ranks(self, request: web.Request) -> web.Response:
        return await _or_400(request, super()._handle_query_dp_ranks)


async def _json(request: web.Request) -> Any:  # noqa: ANN401 - whatever was sent
    try:
        return msgspec.json.decode(await request.read())
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise WireError(f"the body is not JSON: {exc}") from exc


async def _or_400(request: web.Request, handle: Any) -> web.Response:  # noqa: ANN401 - a coroutine function
    """SGLang's own answer, and no traceback for a body that is none."""
    try:
        answer: web.Response = await handle(request)
    except (AttributeError, KeyError, TypeError, ValueError) as exc:
        return web.Response(text=f"cannot use this body: {exc!r}", status=400)
    return answer


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as exc:
        why = "the port is taken" if exc.errno == errno.EADDRINUSE else exc.strerror or str(exc)
        raise BootstrapError(
            f"the bootstrap server cannot listen on {host}:{port}: {why}; give each prefill "
            "server its own --disaggregation-bootstrap-port and tell the router"
        ) from exc
