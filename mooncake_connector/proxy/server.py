"""A proxy's life: what it opens, and how it runs as a command."""

from __future__ import annotations

import asyncio
import logging
import signal
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import aiohttp
from aiohttp import web
from mooncake_engine.errors import ConfigError
from mooncake_engine.metadata import open_store

from mooncake_connector.cluster import NODES
from mooncake_connector.proxy.config import ProxyConfig, fixed_listings
from mooncake_connector.proxy.handlers import Handlers, errors_as_json
from mooncake_connector.proxy.pool import Pool

if TYPE_CHECKING:
    from mooncake_engine.config import MetadataConfig
    from mooncake_engine.metadata.base import MetadataStore, Watch

log = logging.getLogger(__name__)


class Proxy:
    """One proxy on the running event loop.

    Args:
        config: Its settings.
        store: Where nodes publish themselves; None: only the URLs of `config`. Stays the caller's.

    Raises:
        ConfigError: A URL that is none.
    """

    def __init__(self, config: ProxyConfig, store: MetadataStore | None = None) -> None:
        self.port = config.port
        self._config = config
        self._fixed = fixed_listings(config)
        self._store = store
        self._closers = AsyncExitStack()

    async def start(self) -> None:
        """Listen, probe and watch. Once.

        Raises:
            ConfigError: When the address cannot be used.
            MetadataError: When the metadata store cannot be watched.
        """
        async with AsyncExitStack() as closers:
            session = await closers.enter_async_context(
                aiohttp.ClientSession(
                    # A connection per leg: vLLM closes idle ones after 5 s, and a POST that meets
                    # the close is lost, not repeated. A new one costs 0.1 ms on a local network.
                    connector=aiohttp.TCPConnector(limit=0, force_close=True),
                    timeout=aiohttp.ClientTimeout(
                        total=None,  # the first byte and each pause have their own deadlines
                        sock_connect=self._config.connect_timeout_s,
                    ),
                    headers={"Accept-Encoding": "identity"},
                    auto_decompress=False,
                )
            )
            pool = Pool(session, self._fixed)
            closers.push_async_callback(pool.close)
            if self._store is not None:
                watch = await asyncio.to_thread(
                    _watch, self._store, pool, asyncio.get_running_loop()
                )
                closers.push_async_callback(asyncio.to_thread, watch.close)
            await self._listen(Handlers(self._config, session, pool), closers)
            self._closers = closers.pop_all()

    async def stop(self) -> None:
        """Stop listening, give running answers 5 s, drop the rest. Idempotent."""
        closers, self._closers = self._closers, AsyncExitStack()
        await closers.aclose()

    async def _listen(self, handlers: Handlers, closers: AsyncExitStack) -> None:
        app = web.Application(
            client_max_size=self._config.max_body_bytes, middlewares=[errors_as_json]
        )
        app.router.add_post("/v1/completions", handlers.generate)
        app.router.add_post("/v1/chat/completions", handlers.generate)
        app.router.add_get("/v1/models", handlers.models)
        app.router.add_get("/health", handlers.health)
        app.router.add_get("/metrics", handlers.metrics)
        # handler_cancellation: a client that goes away takes its legs with it.
        runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, shutdown_timeout=5.0
        )
        await runner.setup()
        closers.push_async_callback(runner.cleanup)
        try:
            await web.TCPSite(runner, self._config.host, self._config.port).start()
        except OSError as exc:
            raise ConfigError(
                f"the proxy cannot listen on {self._config.host}:{self._config.port}: "
                f"{exc.strerror or exc}; choose another --host or --port"
            ) from exc
        self.port = runner.addresses[0][1]


def serve(config: ProxyConfig, metadata: MetadataConfig | None = None) -> None:
    """Run a proxy until SIGINT or SIGTERM. Blocks; call it from the main thread.

    Args:
        config: Its settings.
        metadata: The metadata store of the nodes; only etcd is watched, p2p has no list of nodes.

    Raises:
        ConfigError: A setting that cannot be used, or nobody to send requests to.
        MetadataError: When etcd cannot be reached.
    """
    watched = metadata is not None and metadata.backend == "etcd"
    if not watched and not (config.prefill and config.decode):
        raise ConfigError(
            "the proxy has nobody to send requests to: give --prefill and --decode, "
            "or a --config whose metadata.backend is etcd"
        )
    store = open_store(metadata, config.host) if metadata is not None and watched else None
    try:
        asyncio.run(_run(Proxy(config, store)))
    finally:
        if store is not None:
            store.close()


async def _run(proxy: Proxy) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    await proxy.start()
    try:
        log.info("proxy listens on port %d", proxy.port)
        await stop.wait()
    finally:
        await proxy.stop()


def _watch(store: MetadataStore, pool: Pool, loop: asyncio.AbstractEventLoop) -> Watch:
    def on_change(key: str, value: bytes | None) -> None:
        loop.call_soon_threadsafe(pool.changed, key, value)

    return store.watch(NODES, on_change)
