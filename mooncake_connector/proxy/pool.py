"""The servers that the proxy knows: which are in, how loaded they are, who gets the next request.

All on one event loop. A server starts out, comes in by its first good `GET /health`, and goes
out when a connection fails, until it is healthy again: a node publishes its record minutes
before its API server listens.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Literal

import aiohttp

from mooncake_connector.cluster import Listing, NodeRecord, decode_node, listings
from mooncake_connector.errors import WireError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

log = logging.getLogger(__name__)

Job = Literal["prefill", "decode"]
JOBS: tuple[Job, ...] = ("prefill", "decode")

#: Seconds between two probes of a server that is out: doubled from the first to the last.
FIRST_PROBE_S, LAST_PROBE_S = 0.1, 5.0
#: A server that takes longer to say that it is healthy gets no requests.
PROBE_TIMEOUT_S = 5.0


class Server:
    """One API server. `in_flight` counts the proxy's own requests to it."""

    def __init__(self, listing: Listing) -> None:
        self.listing = listing
        self.url = listing.url
        self.up = False
        self.in_flight = 0
        self.last_chosen = 0  # the pool's count of choices then
        self.times_chosen = 0
        self.probe: asyncio.Task[None] | None = None

    def does(self, job: Job) -> bool:
        """Whether it is there for that kind of request."""
        return self.listing.prefill if job == "prefill" else self.listing.decode


class Pool:
    """The servers by URL.

    Args:
        session: For probes; the caller closes it after the pool.
        fixed: Servers that are there whatever the metadata store says.
    """

    def __init__(self, session: aiohttp.ClientSession, fixed: Iterable[Listing] = ()) -> None:
        self.servers: dict[str, Server] = {}
        self._session = session
        self._fixed = {listing.url: listing for listing in fixed}
        self._records: dict[str, NodeRecord] = {}
        self._choices = 0
        self._refresh()

    def changed(self, key: str, value: bytes | None) -> None:
        """A node record came, changed or went (None). A record of no use is logged and ignored."""
        self._records.pop(key, None)
        if value is not None:
            try:
                self._records[key] = decode_node(key, value)
            except WireError as exc:
                log.warning("ignored: %s", exc)
        self._refresh()

    def choose(self, job: Job, without: Collection[Server] = ()) -> Server | None:
        """The least loaded server that is in, the longest unused of equals; None: nobody is in."""
        able = [s for s in self.servers.values() if s.up and s.does(job) and s not in without]
        if not able:
            return None
        server = min(able, key=lambda s: (s.in_flight, s.last_chosen))
        self._choices += 1
        server.last_chosen = self._choices
        server.times_chosen += 1
        return server

    def count(self, job: Job, *, up: bool) -> int:
        """How many servers for that job are in, or out."""
        return sum(1 for s in self.servers.values() if s.does(job) and s.up is up)

    def suspect(self, server: Server, why: str) -> None:
        """Take a server out until it is healthy; the first probe starts at once."""
        if server.up and self.servers.get(server.url) is server:
            log.warning("%s is out until its /health answers: %s", server.url, why)
            self._take_out(server)

    async def close(self) -> None:
        """Stop all probes. Idempotent."""
        probes = [server.probe for server in self.servers.values() if server.probe is not None]
        self.servers.clear()
        for probe in probes:
            probe.cancel()
        await asyncio.gather(*probes, return_exceptions=True)

    def _refresh(self) -> None:
        wanted = listings(self._records.values()) | self._fixed
        for url in self.servers.keys() - wanted.keys():
            gone = self.servers.pop(url)
            log.info("%s left", url)
            if gone.probe is not None:
                gone.probe.cancel()
        for url, listing in wanted.items():
            if url in self.servers:
                self.servers[url].listing = listing
            else:
                server = self.servers[url] = Server(listing)
                self._take_out(server)

    def _take_out(self, server: Server) -> None:
        server.up = False
        loop = asyncio.get_running_loop()
        server.probe = loop.create_task(self._probe(server), name=f"probe {server.url}")

    async def _probe(self, server: Server) -> None:
        pause = FIRST_PROBE_S
        while not await self._healthy(server.url):
            await asyncio.sleep(pause)
            pause = min(2 * pause, LAST_PROBE_S)
        server.up = True
        server.probe = None
        log.info("%s is in", server.url)

    async def _healthy(self, url: str) -> bool:
        timeout = aiohttp.ClientTimeout(total=PROBE_TIMEOUT_S)
        try:
            async with self._session.get(f"{url}/health", timeout=timeout) as reply:
                return reply.status == 200
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
            return False  # ValueError: a URL that cannot be one; it stays out
