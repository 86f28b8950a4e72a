"""The HTTP server that tells decode where a prefill server's ranks are, on SGLang's routes.

Ranks register by `PUT /route`, or, when etcd is configured, by their leased record there: then a
rank that died is not offered any more, and this server may restart without its ranks.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import threading
from typing import TYPE_CHECKING

from aiohttp import web
from mooncake_engine.metadata import open_store
from sglang.srt.disaggregation.base.conn import BaseKVBootstrapServer
from sglang.srt.environ import envs

from mooncake_connector.bootstrap import BootstrapError
from mooncake_connector.cluster import node_keys
from mooncake_connector.sglang import settings
from mooncake_connector.sglang.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from mooncake_connector.config import ConnectorConfig

log = logging.getLogger(__name__)

_START_S = 10.0  # resolving a host name is what can take long
_STOP_S = 5.0


class MooncakeKVBootstrapServer(BaseKVBootstrapServer):
    """Serves from the constructor on, on a thread of its own, until `close`.

    Not a `CommonKVBootstrapServer`: what SGLang's Rust server has built in stands in for those,
    and does not hand on which node a rank is; for others it starts the class it finds.

    Attributes:
        host: What it listens on.
        port: Ditto; the port that was found when the constructor was told 0.

    Raises:
        BootstrapError: The port is taken or may not be used.
        ConfigError: Our settings cannot be used.
    """

    def __init__(self, host: str, port: int) -> None:
        self.host = host
        self.port = port
        config = settings.load()
        from_store = config.engine.metadata.backend == "etcd"
        # A request that was not read in its time has failed; SGLang's time for rooms is 120 s.
        interval_s = envs.SGLANG_DISAGGREGATION_BOOTSTRAP_ENTRY_CLEANUP_INTERVAL.get()
        lifetime_s = max(config.request_timeout_s, interval_s)
        self._registry = Registry(room_lifetime_s=lifetime_s, from_store=from_store)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="mooncake-bootstrap", daemon=True)
        # Everything it serves is in memory, so there is no request to wait for when it stops.
        self._runner = web.AppRunner(self._registry.app(), access_log=None, shutdown_timeout=0.5)
        self._opened = contextlib.ExitStack()
        with contextlib.ExitStack() as opening:
            self._thread.start()
            opening.callback(self._end_thread)
            self._on_loop(self._listen(), _START_S + _STOP_S)
            if from_store:
                self._follow_store(config, opening)
            self._opened = opening.pop_all()
        where = "their records in etcd" if from_store else "PUT /route"
        log.info("bootstrap server at http://%s:%d, ranks register by %s", host, self.port, where)

    def close(self) -> None:
        """Stop serving. Idempotent."""
        self._opened.close()

    def _follow_store(self, config: ConnectorConfig, opening: contextlib.ExitStack) -> None:
        """Hand what the store's thread reports to the loop's."""
        store = open_store(config.engine.metadata, config.engine.host)
        opening.callback(store.close)  # before the loop ends: it ends the watch, too

        def on_change(key: str, value: bytes | None) -> None:
            self._loop.call_soon_threadsafe(self._registry.on_record, key, value)

        store.watch(node_keys(settings.engine_id()), on_change)

    def _on_loop(self, work: Coroutine[None, None, None], within_s: float) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(within_s)

    async def _listen(self) -> None:
        await self._runner.setup()
        try:
            async with asyncio.timeout(_START_S):
                await web.TCPSite(self._runner, self.host, self.port).start()
        except OSError as exc:  # a TimeoutError is one, and says nothing
            taken = exc.errno == errno.EADDRINUSE
            why = "the port is taken" if taken else str(exc.strerror or exc) or "no such host known"
            raise BootstrapError(
                f"the bootstrap server cannot listen on {self.host}:{self.port}: {why}; give each "
                "prefill server its own --disaggregation-bootstrap-port and tell the router"
            ) from exc
        self.port = self._runner.addresses[0][1]

    def _run(self) -> None:
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    def _end_thread(self) -> None:
        with contextlib.suppress(TimeoutError):
            self._on_loop(self._runner.cleanup(), _STOP_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_STOP_S)
