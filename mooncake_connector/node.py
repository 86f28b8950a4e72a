"""One worker rank: the engine, the control endpoint and both sides' sessions, on one thread.

The framework's thread calls `prefill.*` directly (they take a lock for microseconds) and
`fetch`, `claim`, `cancel`, `decline`, which only post to the node's loop. Heartbeats come from the
loop's thread, never from engine steps, which stall for a minute under load.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from typing import TYPE_CHECKING

from mooncake_engine.hosts import own_address

from mooncake_connector import wire
from mooncake_connector.control import Channel, join_address
from mooncake_connector.decode import DecodeSide
from mooncake_connector.errors import ConnectorError, PeerUnreachable
from mooncake_connector.peers import Peers, refuse_slow_heart, refuse_unless_compatible
from mooncake_connector.prefill import PrefillSide
from mooncake_connector.stats import Stats

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from mooncake_engine import TransferEngine

    from mooncake_connector.config import ConnectorConfig
    from mooncake_connector.decode import FetchRequest, Results
    from mooncake_connector.layout import CacheLayout, CacheSpec
    from mooncake_connector.peers import Peer, PeerRef
    from mooncake_connector.stats import Counts

log = logging.getLogger(__name__)

_SWEEP_S = 0.25  # how late a deadline may be noticed
_COUNT_S = 1.0  # a scrape comes every few seconds
_CLOSE_S = 5.0


class Node:
    """Prefill, decode, or both, for one rank. Close it before the engine.

    Args:
        config: The connector's settings.
        engine: Has the cache's memory registered; the caller closes it.
        engine_id: The framework's name of the server that this rank belongs to.
        spec: What the cache holds.
        layout: Where its bytes lie.
        rank: Which of that server's ranks this is; default: its tensor-parallel rank.
        on_counts: Told every second, on the node's thread, what was counted since; without it
            whoever likes takes them from `stats`.
        on_peer_lost: Told on the node's thread, behind the requests that it fails, when the
            connection to a prefill node ended or never came about: (peer, why).

    Raises:
        ConnectorError: The control endpoint cannot be bound.
    """

    def __init__(
        self,
        config: ConnectorConfig,
        engine: TransferEngine,
        *,
        engine_id: str,
        spec: CacheSpec,
        layout: CacheLayout,
        rank: int | None = None,
        on_counts: Callable[[Counts], None] | None = None,
        on_peer_lost: Callable[[PeerRef, str], None] = lambda _ref, _reason: None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.incarnation = secrets.token_hex(8)
        self.engine_id = engine_id
        self.rank = spec.tp_rank if rank is None else rank
        self.stats = Stats()
        self._config = config
        self._engine = engine
        self._spec = spec
        self._layout = layout
        self._channels: set[Channel] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._on_counts = on_counts
        self._on_peer_lost = on_peer_lost
        self.prefill = PrefillSide(config, engine, self.stats, self._send, now, len(spec.groups))
        hello = wire.Hello(
            version=wire.VERSION,
            engine_id=engine_id,
            rank=self.rank,
            incarnation=self.incarnation,
            expects="",
            spec=spec,
            heartbeat_s=config.heartbeat_interval_s,
        )
        self._peers = Peers(
            config,
            engine,
            hello,
            layout,
            on_message=lambda peer, message: self._decode.on_message(peer, message),
            on_lost=self._peer_lost,
        )
        self._decode = DecodeSide(
            config,
            engine,
            spec.groups,
            self._peers,
            self.stats,
            self._post,
            now,
            f"{engine_id}:{self.rank}:{self.incarnation}",
        )
        self._thread = threading.Thread(
            target=self._run, name=f"mooncake-node-{self.rank}", daemon=True
        )
        self._thread.start()
        try:
            self.address = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        except OSError as exc:
            self.close()
            raise ConnectorError(
                f"cannot bind the control endpoint to {self._host()!r}, port "
                f"{self._port()}: {exc.strerror or exc}; set engine.host and control_port "
                "to an address of this machine and a free port (0: any)"
            ) from exc

    # ---- decode's entry points, any thread

    def connect(self, peer: PeerRef) -> None:
        """Connect to a prefill node before the first request does."""
        self._post(self._peers.get, peer)

    def claim(self, transfer_id: str, peer: PeerRef) -> None:
        """Keep prefill's hold alive while the request queues here."""
        self._post(self._decode.claim, transfer_id, peer)

    def decline(self, transfer_id: str, request_id: str, peer: PeerRef) -> None:
        """Tell prefill that this request needs none of its pages."""
        self._post(self._decode.decline, transfer_id, request_id, peer)

    def fetch(self, request: FetchRequest) -> None:
        """Read a request's pages; `take_results` names it once."""
        self._post(self._decode.fetch, request)

    def cancel(self, request_id: str) -> None:
        """Stop reading for a request; `take_results` still names it once."""
        self._post(self._decode.cancel, request_id)

    def take_results(self) -> Results:
        """Requests whose fetch ended since the last call."""
        return self._decode.take_results()

    def spec_of(self, peer: PeerRef) -> CacheSpec | None:
        """What a prefill node's cache holds; None while there is no connection to it."""
        return self._peers.spec_of(peer)

    def drain(self, timeout_s: float) -> bool:
        """Fail every fetch; True when no own read touches our pages any more. Blocks."""
        draining = asyncio.run_coroutine_threadsafe(self._decode.drain(), self._loop)
        try:
            draining.result(timeout_s)
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        """End all transfers and the thread: pages are no longer touched. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._thread.is_alive():
            stopping = asyncio.run_coroutine_threadsafe(self._stop(), self._loop)
            try:
                stopping.result(_CLOSE_S)
            except TimeoutError:
                log.error("a read did not end within %g s; closing the engine ends it", _CLOSE_S)  # noqa: TRY400  # a traceback says nothing here
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_CLOSE_S)

    # ---- the loop

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()

    def _post(self, work: Callable[..., object], *args: object) -> None:
        if not self._closed:
            self._loop.call_soon_threadsafe(work, *args)

    def _send(self, channel: Channel, message: wire.Message) -> None:
        self._post(channel.send, message)

    def _peer_lost(self, peer: Peer, reason: str) -> None:
        self._decode.on_peer_lost(peer, reason)
        self._on_peer_lost(peer.ref, reason)

    def _host(self) -> str:
        return own_address(self._config.engine)

    def _port(self) -> int:
        """Ranks of one server on one host take neighbouring ports."""
        return self._config.control_port and self._config.control_port + self.rank

    async def _start(self) -> str:
        self._server = await asyncio.start_server(self._serve, self._host(), self._port())
        self._spawn(self._sweep())
        if self._on_counts is not None:
            self._spawn(self._count(self._on_counts))
        return join_address(self._host(), self._server.sockets[0].getsockname()[1])

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _stop(self) -> None:
        if hasattr(self, "_server"):
            self._server.close()
        await self._peers.close()  # their fetches cancel what they read
        await self._decode.close()
        for channel in list(self._channels):
            channel.close("this node shuts down")
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            try:
                self.prefill.sweep()
                self._decode.sweep()
            except Exception:  # without sweeps nothing would ever time out
                log.exception("looking for what is over failed; it is tried again")

    async def _count(self, on_counts: Callable[[Counts], None]) -> None:
        while True:
            await asyncio.sleep(_COUNT_S)
            try:
                counts = self.stats.take(self.prefill.held_pages())
                if counts is not None:
                    on_counts(counts)
            except Exception:  # a full disk under shared metrics must not end the counting
                log.exception("handing on what was counted failed; it goes on")

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One decode node's connection."""
        channel = Channel.of(self._config, reader, writer)
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._channels.add(channel)
        reason = "this node shuts down"
        try:
            if await self._welcome(channel):
                reason = await channel.run(lambda m: self.prefill.on_message(channel, m))
                log.info("decode node %s left: %s", channel.peer, reason)
        except asyncio.CancelledError:
            # Only `_stop` cancels. Python 3.11 logs a cancelled connection task as an error.
            log.debug("decode node %s is left: %s", channel.peer, reason)
        finally:
            channel.close(reason)
            self._channels.discard(channel)
            self._tasks.discard(task)
            self.prefill.on_closed(channel)

    async def _welcome(self, channel: Channel) -> bool:
        """Answer Hello; False when the caller is not one of ours or cannot be served."""
        try:
            hello = await asyncio.wait_for(channel.receive(), self._config.engine.connect_timeout_s)
            if not isinstance(hello, wire.Hello):
                raise PeerUnreachable(f"it began with {type(hello).__name__} instead of Hello")
            self._check(hello)
        except (ConnectorError, OSError, EOFError) as exc:
            reason = str(exc)
            if isinstance(exc, TimeoutError):
                limit = self._config.engine.connect_timeout_s
                reason = f"it did not say Hello within {limit:g} s (engine.connect_timeout_s)"
            log.warning("refused a connection from %s: %s", channel.peer, reason)
            channel.send(wire.Refused(reason=reason))
            await channel.flush()
            return False
        channel.send(
            wire.Welcome(
                version=wire.VERSION,
                engine_id=self.engine_id,
                rank=self.rank,
                incarnation=self.incarnation,
                spec=self._spec,
                layout=self._layout,
                segment=self._engine.record(),
                heartbeat_s=self._config.heartbeat_interval_s,
            )
        )
        return True

    def _check(self, hello: wire.Hello) -> None:
        if hello.version != wire.VERSION:
            raise PeerUnreachable(
                f"it speaks wire version {hello.version}, this node {wire.VERSION}; install the "
                "same mooncake-connector on both"
            )
        if hello.expects not in ("", self.incarnation):
            raise PeerUnreachable(
                f"it expects incarnation {hello.expects}, this node restarted as "
                f"{self.incarnation}; the KV that it came for is gone"
            )
        refuse_unless_compatible(self._spec, hello.spec)
        refuse_slow_heart(hello.heartbeat_s, self._config)
