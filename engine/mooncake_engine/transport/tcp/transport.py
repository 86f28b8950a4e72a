"""TcpTransport: serves this engine's memory over TCP and opens links to peers."""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Annotated, ClassVar

import msgspec
from typing_extensions import override

from mooncake_engine import hosts, native
from mooncake_engine.errors import LaneError, PathUnavailable
from mooncake_engine.transport import sockets
from mooncake_engine.transport.base import BulkLink, Capabilities, Lane, Link, Transport
from mooncake_engine.transport.tcp import wire
from mooncake_engine.transport.tcp.dialer import Dialer
from mooncake_engine.transport.tcp.exchange import exchange_over
from mooncake_engine.transport.tcp.lane import TcpLane
from mooncake_engine.transport.tcp.server import Server
from mooncake_engine.transport.tcp.wide import WideExchange

if TYPE_CHECKING:
    from mooncake_engine.config import EngineConfig, TcpConfig
    from mooncake_engine.grants import GrantTable
    from mooncake_engine.memory import RegionTable
    from mooncake_engine.native import Library
    from mooncake_engine.types import SegmentRecord


class TcpEndpoint(msgspec.Struct, frozen=True):
    """Where a peer's data socket listens; this transport's blob in the segment record."""

    host: str
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    version: int


class TcpLink(Link):
    """One peer, reached over TCP: a connection for each lane, and some for large batches."""

    def __init__(self, config: TcpConfig, dialer: Dialer, library: Library | None) -> None:
        """Open the first lane, which proves that the peer is there. Raises `LaneError`."""
        self._dialer = dialer
        self._library = library
        wide = config.lanes_per_peer // 2 if library else 0
        self.lanes = config.lanes_per_peer - wide
        self.slice_bytes = config.slice_bytes
        if library and wide:
            over = functools.partial(WideExchange, library, config.slice_bytes)
            self.bulk = BulkLink(lambda: TcpLane(dialer, over, wide))
        self._lock = threading.Lock()  # guards _first
        self._first: Lane | None = self._lane()

    def _lane(self) -> Lane:
        return TcpLane(self._dialer, lambda streams: exchange_over(streams[0], self._library))

    @override
    def open_lane(self) -> Lane:
        return self._take_first() or self._lane()

    @override
    def close(self) -> None:
        if lane := self._take_first():
            lane.close()

    def _take_first(self) -> Lane | None:
        with self._lock:
            lane, self._first = self._first, None
            return lane


class TcpTransport(Transport):
    """Blocking sockets and one system call per slice."""

    scheme: ClassVar[str] = "tcp"
    capabilities: ClassVar[Capabilities] = Capabilities()

    @override
    def __init__(
        self, config: EngineConfig, regions: RegionTable, grants: GrantTable, incarnation: str
    ) -> None:
        super().__init__(config, regions, grants, incarnation)
        if not 0 < len(incarnation.encode()) <= wire.MAX_INCARNATION:
            raise PathUnavailable(
                f"tcp cannot tell the incarnation {incarnation!r} to peers: it must have 1 to "
                f"{wire.MAX_INCARNATION} bytes"
            )
        tcp = config.tcp
        bind = tcp.bind_address or config.host or hosts.default_address()
        listener = sockets.listen(bind, tcp.min_port, tcp.max_port)
        port: int = listener.getsockname()[1]
        host = config.host or (hosts.default_address() if hosts.is_wildcard(bind) else bind)
        self._library = native.wanted("tcp", use=tcp.native)
        self._endpoint = TcpEndpoint(host, port, wire.VERSION)
        self._server = Server(listener, config, regions, grants, incarnation, self._library)

    @override
    def endpoint(self) -> msgspec.Raw:
        return msgspec.Raw(msgspec.msgpack.encode(self._endpoint))

    @override
    def connect(self, peer: SegmentRecord) -> Link:
        try:
            return TcpLink(self.config.tcp, self._dialer(peer), self._library)
        except LaneError as failure:
            raise PathUnavailable(str(failure)) from failure

    def _dialer(self, peer: SegmentRecord) -> Dialer:
        blob = peer.endpoints.get(self.scheme)
        if blob is None:
            raise PathUnavailable(f"{peer.name} published no tcp endpoint")
        try:
            endpoint = msgspec.msgpack.decode(blob, type=TcpEndpoint)
        except msgspec.MsgspecError as bad:
            raise PathUnavailable(
                f"the tcp endpoint that {peer.name} published cannot be read ({bad}); run the "
                "same release on both"
            ) from bad
        return Dialer(
            endpoint.host,
            endpoint.port,
            name=peer.name,
            incarnation=peer.incarnation,
            timeout_s=self.config.connect_timeout_s,
        )

    @override
    def close(self) -> None:
        self._server.close()
