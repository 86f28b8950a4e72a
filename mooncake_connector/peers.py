"""Decode's connections to prefill nodes: one per node, made when first needed, shared by requests.

Lives on the node's loop. A connection that ends, or never comes about, is told once with its
reason and thrown away; the next request tries anew.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from typing import TYPE_CHECKING

import aiohttp
import msgspec
from mooncake_engine import EngineError
from typing_extensions import override

from mooncake_connector import wire
from mooncake_connector.bootstrap import BootstrapError, decode_query
from mooncake_connector.control import Channel, split_address
from mooncake_connector.errors import PeerUnreachable, WireError
from mooncake_connector.layout import PieceTable
from mooncake_connector.plan import differences, narrowed

if TYPE_CHECKING:
    from collections.abc import Callable

    from mooncake_engine import Segment, SegmentRecord, TransferEngine

    from mooncake_connector.config import ConnectorConfig
    from mooncake_connector.layout import CacheLayout, CacheSpec

log = logging.getLogger(__name__)


class PeerRef(msgspec.Struct, frozen=True):
    """How a request names the prefill node of our rank.

    Attributes:
        address: Its control endpoint "host:port", or "" when only the bootstrap server is known.
        incarnation: Of its process, "" when unknown; another one there is refused.
        bootstrap: URL of a bootstrap server that knows the address, else "".
        engine_id: What to ask the bootstrap server for.
        rank: Ditto.
        protocol: Forces one transport instead of the configured choice; "" but in tests.
    """

    address: str
    incarnation: str = ""
    bootstrap: str = ""
    engine_id: str = ""
    rank: int = 0
    protocol: str = ""

    @override
    def __str__(self) -> str:
        return self.address or f"{self.engine_id}[{self.rank}] by {self.bootstrap}"


class Peer:
    """One prefill node as decode sees it. What has no default exists once it is open.

    Attributes:
        ref: As requests name it.
        segment: Its memory.
        spec: What its cache holds.
        tables: Where its pages are, per group.
        own: Where ours are that correspond: of the same layers.
        channel: The connection, None while there is none.
        lost: Why it can no longer be used; "" while it can.
    """

    def __init__(self, ref: PeerRef) -> None:
        self.ref = ref
        self.segment: Segment
        self.spec: CacheSpec
        self.tables: list[PieceTable]
        self.own: list[PieceTable]
        self.channel: Channel | None = None
        self.lost = ""
        self._early: list[wire.Message] = []

    def send(self, message: wire.Message) -> None:
        """Send, or keep until the connection is open; nothing when it is lost."""
        if self.channel is not None:
            self.channel.send(message)
        elif not self.lost:
            self._early.append(message)

    def opened(self, channel: Channel) -> None:
        """The connection is there: send what waited for it."""
        self.channel = channel
        for message in self._early:
            channel.send(message)
        self._early.clear()


class Peers:
    """All prefill nodes that this decode node talks to."""

    def __init__(
        self,
        config: ConnectorConfig,
        engine: TransferEngine,
        hello: wire.Hello,
        layout: CacheLayout,
        *,
        on_message: Callable[[Peer, wire.AnyMessage], None],
        on_lost: Callable[[Peer, str], None],
    ) -> None:
        """`hello` is sent to every peer; `layout` is our cache's; callbacks run on the loop."""
        self._config = config
        self._engine = engine
        self._hello = hello
        self._layout = layout
        self._on_message = on_message
        self._on_lost = on_lost
        self._peers: dict[PeerRef, Peer] = {}
        self._users: Counter[Segment] = Counter()  # several refs may name one engine
        self._closing: dict[Segment, asyncio.Future[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def get(self, ref: PeerRef) -> Peer:
        """The peer; starts to connect when there is no connection."""
        peer = self._peers.get(ref)
        if peer is None:
            peer = self._peers[ref] = Peer(ref)
            task = asyncio.get_running_loop().create_task(self._serve(peer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return peer

    def spec_of(self, ref: PeerRef) -> CacheSpec | None:
        """What that peer's cache holds; None while there is no connection. Any thread."""
        peer = self._peers.get(ref)
        return peer.spec if peer is not None and peer.channel is not None else None

    async def close(self) -> None:
        """End all connections."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, peer: Peer) -> None:
        reason = "is not used any more: this node shuts down"
        opened = False
        try:
            channel = await self._connect(peer)
            opened = True
            peer.opened(channel)
            reason = "is gone: " + await channel.run(lambda m: self._on_message(peer, m))
        except (PeerUnreachable, WireError, EngineError) as exc:
            reason = str(exc)
        except TimeoutError:
            limit = self._config.engine.connect_timeout_s
            reason = f"did not answer within {limit:g} s (engine.connect_timeout_s)"
        except EOFError:
            reason = "closed the connection before it said welcome"
        except (OSError, ValueError) as exc:
            reason = f"cannot be reached: {exc}"
        except Exception as exc:  # one bad peer must not end the node's loop
            log.exception("connection to prefill node %s", peer.ref)
            reason = f"cannot be used: {exc!r}"
        finally:
            if peer.channel is not None:
                peer.channel.close(reason)
            peer.lost = reason
            peer.channel = None
            if self._peers.get(peer.ref) is peer:
                del self._peers[peer.ref]
            self._on_lost(peer, f"{peer.ref} {reason}")
        if opened:  # not when cancelled: then the engine closes next, with all its segments
            await self._give_back(peer.segment)

    async def _open(self, record: SegmentRecord, protocol: str | None) -> Segment:
        """Open the segment, or share it; it is not about to be closed."""
        while True:
            segment = await asyncio.to_thread(self._engine.open_segment, record, protocol=protocol)
            closing = self._closing.get(segment)
            if closing is None:
                self._users[segment] += 1
                return segment
            await closing

    async def _give_back(self, segment: Segment) -> None:
        """Close the segment when nobody shares it."""
        self._users[segment] -= 1
        if not self._users[segment]:
            del self._users[segment]
            self._closing[segment] = asyncio.ensure_future(asyncio.to_thread(segment.close))
            await self._closing[segment]
            del self._closing[segment]

    async def _connect(self, peer: Peer) -> Channel:
        """Connect, exchange Hello and Welcome, check that a plan exists, open the segment."""
        timeout = self._config.engine.connect_timeout_s
        address = peer.ref.address or await self._look_up(peer.ref)
        host, port = split_address(address)
        reader, writer = await asyncio.wait_for(asyncio.open_connection(host, port), timeout)
        channel = Channel.of(self._config, reader, writer)
        try:
            channel.send(msgspec.structs.replace(self._hello, expects=peer.ref.incarnation))
            welcome = await asyncio.wait_for(channel.receive(), timeout)
            self._check(welcome)
            assert isinstance(welcome, wire.Welcome)
            peer.spec, peer.tables = welcome.spec, _tables(welcome)
            peer.own = narrowed(self._layout, self._hello.spec, welcome.spec)
            peer.segment = await self._open(welcome.segment, peer.ref.protocol or None)
        except BaseException:
            channel.close("the handshake failed")
            raise
        log.info(
            "connected to prefill node %s (%s rank %d), KV by %s: %s",
            address,
            welcome.engine_id,
            welcome.rank,
            peer.segment.path.scheme,
            peer.segment.path.reason,
        )
        return channel

    def _check(self, answer: wire.AnyMessage) -> None:
        match answer:
            case wire.Refused(reason=reason):
                raise PeerUnreachable(f"refused us: {reason}")
            case wire.Welcome(spec=spec, heartbeat_s=heartbeat_s):
                refuse_unless_compatible(spec, self._hello.spec)
                refuse_slow_heart(heartbeat_s, self._config)
            case _:
                raise WireError(f"answered Hello with {type(answer).__name__}")

    async def _look_up(self, ref: PeerRef) -> str:
        """Ask the bootstrap server, in the form of vLLM's MooncakeConnector."""
        url = f"{ref.bootstrap.rstrip('/')}/query"
        timeout = aiohttp.ClientTimeout(total=self._config.engine.connect_timeout_s)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.get(url) as response,
            ):
                response.raise_for_status()
                engines = decode_query(url, await response.read())
        except (aiohttp.ClientError, TimeoutError) as exc:
            raise PeerUnreachable(
                f"cannot be found: {url} does not answer: {exc or type(exc).__name__}"
            ) from exc
        except BootstrapError as exc:
            raise PeerUnreachable(f"cannot be found: {exc}") from exc
        entries = [e for e in engines.values() if ref.engine_id in ("", e.engine_id)]
        if not entries and len(engines) == 1:
            # vllm-router asks for ids once, at its start: prefill has restarted since. Who
            # answers there now either knows the transfer and its prompt key, or says that not.
            entries = list(engines.values())
        for entry in entries:
            if ref.rank in entry.worker_addr:
                return entry.worker_addr[ref.rank][0]
        raise PeerUnreachable(
            f"cannot be found: {url} knows no rank {ref.rank} of engine {ref.engine_id}"
        )


def _tables(welcome: wire.Welcome) -> list[PieceTable]:
    """Where its pages are; WireError when its layout and its spec do not describe one cache."""
    layers = [len(group.layers) for group in welcome.spec.groups]
    found = [len(group) for group in welcome.layout.groups]
    if found != layers:
        raise WireError(f"describes {layers} layers by group and gives the addresses of {found}")
    try:
        return [PieceTable(group) for group in welcome.layout.groups]
    except (OverflowError, ValueError) as exc:
        raise WireError(f"gives addresses that are none: {exc}") from exc


def refuse_slow_heart(heartbeat_s: float, config: ConnectorConfig) -> None:
    """Raise `PeerUnreachable` when a peer would be taken for dead between two of its beats."""
    if heartbeat_s >= config.peer_dead_after_s:
        raise PeerUnreachable(
            f"says so little (heartbeat_interval_s {heartbeat_s:g}) that this node takes it for "
            f"dead (peer_dead_after_s {config.peer_dead_after_s:g}); set them alike on both"
        )


def refuse_unless_compatible(prefill: CacheSpec, decode: CacheSpec) -> None:
    """Raise `PeerUnreachable` naming every field that differs."""
    found = differences(prefill, decode)
    if found:
        raise PeerUnreachable(
            "has a KV cache that ours cannot exchange pages with: " + "; ".join(found)
        )
