"""The routes of SGLang's bootstrap server: ranks register themselves, decode and routers ask.

    PUT  /route           a rank's row (`routes.Row`); not when rows come from the metadata store
    GET  /route           ?prefill_dp_rank&prefill_cp_rank&target_tp_rank&target_pp_rank: where that
                          rank is; all -1: the topology; 503 until every rank is there
    POST /register_dp_rank, /query_dp_ranks     which data-parallel rank has a bootstrap_room
    GET  /health          200

Status 400 is final; 409, a rank that contradicts another, and 503 may pass: try again.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Annotated, TypeVar

import msgspec
from aiohttp import web

from mooncake_connector.cluster import decode_node
from mooncake_connector.errors import WireError
from mooncake_connector.sglang.rooms import RoomRanks
from mooncake_connector.sglang.routes import (
    RouteConflict,
    RouteTable,
    Row,
    decode_row,
    of_one_start,
)

if TYPE_CHECKING:
    from mooncake_connector.sglang.routes import Position

T = TypeVar("T")

log = logging.getLogger(__name__)

#: A row has 900 bytes, a room in a query at most 20.
MAX_BODY_BYTES = 1 << 20
_QUERY = ("prefill_dp_rank", "prefill_cp_rank", "target_tp_rank", "target_pp_rank")


class _RoomRank(msgspec.Struct):
    bootstrap_room: int
    dp_rank: Annotated[int, msgspec.Meta(ge=0)]


class _Rooms(msgspec.Struct):
    bootstrap_rooms: list[int]


class Registry:
    """What a bootstrap server knows, and the HTTP handlers for it. Use from one event loop.

    Args:
        room_lifetime_s: How long the data-parallel rank of a request is known.
        from_store: The rows come by `on_record` from the metadata store. Then `PUT` is refused: a
            row without a lease would outlive its rank, and a rank that sends one was started with
            other settings than this server, of which it had better hear.
    """

    def __init__(self, *, room_lifetime_s: float, from_store: bool) -> None:
        self._table = RouteTable()
        self._rooms = RoomRanks(room_lifetime_s)
        self._from_store = from_store
        self._records: dict[str, Row] = {}  # by key in the store
        self._conflict = ""

    def app(self) -> web.Application:
        """A new application that serves this registry."""
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        app.router.add_put("/route", self._put_route)
        app.router.add_get("/route", self._get_route)
        app.router.add_post("/register_dp_rank", self._register_dp_rank)
        app.router.add_post("/query_dp_ranks", self._query_dp_ranks)
        app.router.add_get("/health", self._health)
        return app

    def on_record(self, key: str, value: bytes | None) -> None:
        """A rank's node record in the metadata store came, changed or (None) went."""
        try:
            route = decode_node(key, value).route if value is not None else None
            row = decode_row(route) if route is not None else None
        except WireError as exc:
            log.warning("ignored the record %s: %s", key, exc)
            row = None
        if row is None:
            self._records.pop(key, None)
        else:
            self._records[key] = row
        before = self._conflict
        self._table, self._conflict = of_one_start(self._records.values())
        if self._conflict and self._conflict != before:
            log.warning("not all ranks belong together (yet): %s", self._conflict)

    async def _put_route(self, request: web.Request) -> web.Response:
        row = await _body(request, Row)
        if self._from_store:
            raise web.HTTPBadRequest(
                text="this prefill server reads its ranks from etcd (engine.metadata); start "
                f"rank {row.rank} at {row.rank_ip} with the same settings"
            )
        try:
            self._table.add(row)
        except RouteConflict as exc:
            raise web.HTTPConflict(text=str(exc)) from exc
        return web.Response(text="OK")

    async def _get_route(self, request: web.Request) -> web.Response:
        try:
            dp, cp, tp, pp = (int(request.query[name]) for name in _QUERY)
        except (KeyError, ValueError) as exc:
            raise web.HTTPBadRequest(
                text=f"give a whole number for each of {', '.join(_QUERY)}, or -1 for all of them"
            ) from exc
        topology = self._table.topology()
        if topology is None:
            why = [self._table.missing(), self._conflict]
            raise web.HTTPServiceUnavailable(text="; ".join(filter(None, why)))
        position: Position = (dp, cp, tp, pp)
        found = topology if position == (-1, -1, -1, -1) else self._table.rank(position)
        if found is None:
            named = ", ".join(f"{n}={r}" for n, r in zip(_QUERY, position, strict=True))
            raise web.HTTPNotFound(text=f"this prefill server has no rank {named}")
        return _json(found)

    async def _register_dp_rank(self, request: web.Request) -> web.Response:
        body = await _body(request, _RoomRank)
        self._rooms.put(body.bootstrap_room, body.dp_rank, time.monotonic())
        return web.Response(text="OK")

    async def _query_dp_ranks(self, request: web.Request) -> web.Response:
        body = await _body(request, _Rooms)
        return _json(self._rooms.find(body.bootstrap_rooms, time.monotonic()))

    async def _health(self, _request: web.Request) -> web.Response:
        return web.Response(text="OK")


async def _body(request: web.Request, kind: type[T]) -> T:
    body = await request.read()
    try:
        # Not strict: SGLang's own server takes numbers in strings, too.
        return msgspec.json.decode(body, type=kind, strict=False)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise web.HTTPBadRequest(text=f"{request.path} cannot use this body: {exc}") from exc


def _json(answer: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(answer), content_type="application/json")
