"""TcpTransport: serves this engine's memory over TCP and opens links to peers."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Annotated, ClassVar

import msgspec
import numpy as np
from typing_extensions import override

from mooncake_engine.errors import LaneError, PathUnavailable
from mooncake_engine.transport.base import Capabilities, Lane, Link, Transport
from mooncake_engine.transport.tcp import sockets, wire
from mooncake_engine.transport.tcp.lane import TcpLane, explain
from mooncake_engine.transport.tcp.server import Server
from mooncake_engine.transport.tcp.stream import DeadlinePassed, Stream, buffer_of, whole
from mooncake_engine.types import Status

if TYPE_CHECKING:
    from mooncake_engine.config import EngineConfig
    from mooncake_engine.grants import GrantTable
    from mooncake_engine.memory import RegionTable
    from mooncake_engine.types import SegmentRecord


class TcpEndpoint(msgspec.Struct, frozen=True):
    """Where a peer's data socket listens; this transport's blob in the segment record."""

    host: str
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    version: int


class TcpLink(Link):
    """One peer, reached over TCP."""

    def __init__(self, config: EngineConfig, peer: SegmentRecord, endpoint: TcpEndpoint) -> None:
        """Open the first lane, which proves that the peer is there. Raises `LaneError`."""
        self.lanes = config.tcp.lanes_per_peer
        self.slice_bytes = config.tcp.slice_bytes
        self._timeout_s = config.connect_timeout_s
        self._endpoint = endpoint
        self._incarnation = peer.incarnation
        self._peer = f"{peer.name} at {sockets.host_port(endpoint.host, endpoint.port)}"
        self._lock = threading.Lock()  # guards _first
        self._first: Lane | None = self._open()

    @override
    def open_lane(self) -> Lane:
        with self._lock:
            lane, self._first = self._first, None
        return lane or self._open()

    @override
    def close(self) -> None:
        with self._lock:
            lane, self._first = self._first, None
        if lane:
            lane.close()

    def _open(self) -> Lane:
        deadline = time.monotonic() + self._timeout_s
        try:
            stream = Stream(sockets.dial(self._endpoint.host, self._endpoint.port, self._timeout_s))
        except (OSError, ValueError) as failure:  # ValueError: a host that no name can be
            raise LaneError(
                Status.PEER_GONE,
                f"cannot connect to {self._peer}: {failure}; is the engine running, and is the "
                "port reachable from here?",
            ) from failure
        try:
            self._greet(stream, deadline)
        except BaseException:
            stream.close()
            raise
        return TcpLane(stream, self._peer)

    def _greet(self, stream: Stream, deadline: float) -> None:
        buffer = np.empty(wire.WELCOME.size, np.uint8)
        try:
            stream.send(whole(buffer_of(wire.pack_hello(self._incarnation))), deadline)
            stream.receive(whole(buffer), deadline)
            welcome = wire.unpack_welcome(buffer.tobytes())
        except DeadlinePassed as silence:
            raise LaneError(
                Status.PEER_GONE,
                f"{self._peer} took the connection and said nothing for {self._timeout_s:g} s; "
                "it is stopped, or another program has that port",
            ) from silence
        except (OSError, EOFError, wire.Malformed) as failure:
            raise LaneError(
                Status.PEER_GONE, f"no greeting from {self._peer}: {explain(failure)[1]}"
            ) from failure
        if welcome.verdict is wire.Verdict.OTHER_INCARNATION:
            raise LaneError(
                Status.PEER_GONE,
                f"{self._peer} is incarnation {welcome.incarnation} now, not {self._incarnation}: "
                "the engine restarted and its old addresses are void; look its segment up again",
            )
        if welcome.verdict is wire.Verdict.LANES_FULL:
            raise LaneError(
                Status.REFUSED,
                f"{self._peer} serves as many lanes as it may; raise tcp.max_served_lanes there "
                "or lower tcp.lanes_per_peer here",
            )
        if welcome.verdict is wire.Verdict.OTHER_VERSION:
            raise LaneError(
                Status.FAILED,
                f"{self._peer} speaks version {welcome.version} of the tcp protocol, we speak "
                f"{wire.VERSION}; run the same release on both",
            )


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
        bind = tcp.bind_address or config.host or sockets.default_address()
        listener = sockets.listen(bind, tcp.min_port, tcp.max_port)
        port: int = listener.getsockname()[1]
        host = config.host or (sockets.default_address() if sockets.is_wildcard(bind) else bind)
        self._endpoint = TcpEndpoint(host, port, wire.VERSION)
        self._server = Server(listener, config, regions, grants, incarnation)

    @override
    def endpoint(self) -> msgspec.Raw:
        return msgspec.Raw(msgspec.msgpack.encode(self._endpoint))

    @override
    def connect(self, peer: SegmentRecord) -> Link:
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
        try:
            return TcpLink(self.config, peer, endpoint)
        except LaneError as failure:
            raise PathUnavailable(str(failure)) from failure

    @override
    def close(self) -> None:
        self._server.close()
