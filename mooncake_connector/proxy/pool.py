"""The servers that the proxy knows: which are in, how loaded they are, who gets the next request.

All on one event loop. A server starts out, comes in by its first good `GET /health`, and goes
out when a connection fails, until it is healthy again: a node publishes its record minutes
before its API server listens.

A server whose record is gone leaves, unless it is the last one for its job: where etcd was too slow
to renew leases, all records go at once, and come back some seconds later.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Literal

import aiohttp

from mooncake_connector.cluster import Listing, NodeRecord, decode_node, listings
from mooncake_connector.errors import WireError

if TYPE_CHECKING:
    from collections.abc import Collection, Container, Iterable

log = logging.getLogger(__name__)

Job = Literal["prefill", "decode"]
JOBS: tuple[Job, ...] = ("prefill", "decode")

#: Seconds between two probes of a server that is out: doubled from the first to the last.
FIRST_PROBE_S, LAST_PROBE_S = 0.1, 5.0
#: A server that takes longer to say that it is healthy gets no requests.
PROBE_TIMEOUT_S = 5.0
#: So long the last servers for a job are used without a record, and how often they are probed then.
WITHOUT_RECORD_S, LAST_ONE_PROBE_S = 30.0, 1.0


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

    @property
    def leaving(self) -> bool:
        """It is in without a record, and probed for as long."""
        return self.up and self.probe is not None

    def stop_probe(self) -> None:
        """Ask it nothing more."""
        if self.probe is not None:
            self.probe.cancel()
            self.probe = None

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
        if not server.up or self.servers.get(server.url) is not server:
            return
        if server.leaving:
            self._drop(server, why)
            return
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
            server = self.servers[url]
            if not self._is_last(server, wanted):
                self._drop(server)
            elif not server.leaving:
                log.warning(
                    "%s has no record any more, nor has any other server for its job: used for "
                    "another %g s while it is healthy",
                    url,
                    WITHOUT_RECORD_S,
                )
                loop = asyncio.get_running_loop()
                server.probe = loop.create_task(self._leave(server), name=f"probe {url}")
        for url, listing in wanted.items():
            if url not in self.servers:
                self.servers[url] = Server(listing)
                self._take_out(self.servers[url])
                continue
            server = self.servers[url]
            server.listing = listing
            if server.leaving:
                log.info("%s has a record again", url)
                server.stop_probe()

    def _is_last(self, server: Server, wanted: Container[str]) -> bool:
        """Whether it is in, and no server with a record is that can do one of its jobs."""
        others = [other for other in self.servers.values() if other.up and other.url in wanted]
        jobs = [job for job in JOBS if server.does(job)]
        return server.up and not all(any(o.does(job) for o in others) for job in jobs)

    def _drop(self, server: Server, why: str = "it has no record any more") -> None:
        log.info("%s left: %s", server.url, why)
        del self.servers[server.url]
        server.stop_probe()

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
        self._refresh()  # it takes the place of some that have no record

    async def _leave(self, server: Server) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WITHOUT_RECORD_S):
                while await self._healthy(server.url):  # noqa: ASYNC110 # seen from outside only
                    await asyncio.sleep(LAST_ONE_PROBE_S)
        server.probe = None
        self._drop(server)

    async def _healthy(self, url: str) -> bool:
        timeout = aiohttp.ClientTimeout(total=PROBE_TIMEOUT_S)
        try:
            async with self._session.get(f"{url}/health", timeout=timeout) as reply:
                return reply.status == 200
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
            return False  # ValueError: a URL that cannot be one; it stays out
