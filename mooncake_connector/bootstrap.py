"""`GET /query`: who the prefill workers are, in the form of vLLM's in-tree MooncakeConnector.

vllm-router's mooncake mode asks it once when it starts and hands its URL on to decode, which asks
again for the workers' endpoints. The reply, for tensor-parallel size 2 (`docs/routers.md`):

    {"0": {"engine_id": "...", "worker_addr": {"0": {"0": "host:port"}, "1": {"0": "host:port"}}}}

that is data-parallel rank -> engine, tensor-parallel rank -> pipeline rank -> address.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from mooncake_connector.errors import ConnectorError

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Where vllm-router looks when it is not told another port.
DEFAULT_PORT = 8998


class BootstrapError(ConnectorError):
    """The bootstrap server cannot listen, or does not say what decode needs."""


class EngineEntry(msgspec.Struct):
    """One data-parallel rank; addresses are control endpoints, "host:port"."""

    engine_id: str
    worker_addr: dict[int, dict[int, str]]  # tensor-parallel rank -> pipeline rank -> address


class Registration(msgspec.Struct, frozen=True):
    """Body of `POST /register`."""

    engine_id: str
    dp_rank: int
    tp_rank: int
    pp_rank: int
    addr: str


class BootstrapServer:
    """Serves `GET /query` and, when told to, `POST /register`. Use from one event loop.

    Args:
        host: Address to listen on.
        port: 0 takes any; then see `port` after `start`.
        engine_id: This engine's id; it must be the same in every rank.
        dp_rank: This engine's data-parallel rank.
        worker_addresses: Tensor-parallel rank -> control endpoint "host:port".
        accept_registrations: Let other engines of a data-parallel group add themselves over
            HTTP. Off by default: anybody who reaches the port could add an address.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        engine_id: str,
        worker_addresses: Mapping[int, str],
        dp_rank: int = 0,
        accept_registrations: bool = False,
    ) -> None:
        self.host = host
        self.port = port
        self._engines: dict[int, EngineEntry] = {}
        self._runner: web.AppRunner | None = None
        self._app = web.Application(client_max_size=64 << 10)  # a registration has 200 bytes
        self._app.router.add_get("/query", self._query)
        if accept_registrations:
            self._app.router.add_post("/register", self._register)
        for tp_rank, address in worker_addresses.items():
            self.register(Registration(engine_id, dp_rank, tp_rank, 0, address))

    async def start(self) -> None:
        """Listen.

        Raises:
            BootstrapError: When the port is taken or may not be used. Nothing is left open; the
                engine can go on, only routers in mooncake mode do not find it.
        """
        if self._runner is not None:
            return
        # Everything it serves is in memory, so there is no request to wait for when it stops.
        runner = web.AppRunner(self._app, access_log=None, shutdown_timeout=0.5)
        await runner.setup()
        try:
            site = web.TCPSite(runner, self.host, self.port)
            await site.start()
        except OSError as exc:
            await runner.cleanup()
            taken = exc.errno == errno.EADDRINUSE
            raise BootstrapError(
                f"the bootstrap server cannot listen on {self.host}:{self.port}: "
                + (
                    "the port is taken (8998 is also SGLang's default); "
                    "set bootstrap_port to a free one and tell the router"
                    if taken
                    else str(exc.strerror or exc)
                )
            ) from exc
        self._runner = runner
        self.port = runner.addresses[0][1]

    async def stop(self) -> None:
        """Stop listening. Idempotent."""
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    def register(self, worker: Registration) -> None:
        """Add a worker; the same one again is no error.

        Raises:
            BootstrapError: When that rank is already somebody else.
        """
        entry = self._engines.setdefault(worker.dp_rank, EngineEntry(worker.engine_id, {}))
        if entry.engine_id != worker.engine_id:
            raise BootstrapError(
                f"data-parallel rank {worker.dp_rank} is engine {entry.engine_id}, "
                f"not {worker.engine_id}"
            )
        stages = entry.worker_addr.setdefault(worker.tp_rank, {})
        if stages.setdefault(worker.pp_rank, worker.addr) != worker.addr:
            raise BootstrapError(
                f"worker dp={worker.dp_rank} tp={worker.tp_rank} pp={worker.pp_rank} is at "
                f"{stages[worker.pp_rank]}, it cannot also be at {worker.addr}"
            )

    async def _query(self, _request: web.Request) -> web.Response:
        return web.json_response(body=msgspec.json.encode(self._engines))

    async def _register(self, request: web.Request) -> web.Response:
        try:
            self.register(msgspec.json.decode(await request.read(), type=Registration))
        except (msgspec.DecodeError, UnicodeDecodeError, BootstrapError) as exc:
            return web.json_response({"detail": str(exc)}, status=400)
        return web.json_response({"status": "ok"})


def decode_query(url: str, body: bytes) -> dict[int, EngineEntry]:
    """The engines of a `GET /query` reply, by data-parallel rank.

    Raises:
        BootstrapError: When it is none, or knows no engine; the message names `url`.
    """
    try:
        engines = msgspec.json.decode(body, type=dict[int, EngineEntry])
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise BootstrapError(f"{url} did not answer as a bootstrap server does: {exc}") from exc
    if not engines:
        raise BootstrapError(f"{url} knows no prefill engine yet")
    return engines
