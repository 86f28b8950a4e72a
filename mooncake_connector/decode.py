"""Decode's side of a node: fetches that subscribe, read, confirm and report.

Everything here runs on the node's loop but the thread-safe entry points in `node.py`, which post
to it, and `take_results`. Own reads go through the engine; their completions are posted back.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, NamedTuple

from mooncake_engine import EngineError, Status

from mooncake_connector import plan, wire
from mooncake_connector.errors import WireError
from mooncake_connector.session import FETCH_TABLE, FetchAction, FetchEvent, FetchState, step

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mooncake_engine import Batch, Completion, TransferEngine
    from mooncake_engine.types import Uint64s

    from mooncake_connector.config import ConnectorConfig
    from mooncake_connector.layout import GroupSpec
    from mooncake_connector.peers import Peer, PeerRef, Peers
    from mooncake_connector.plan import PageRun
    from mooncake_connector.stats import Stats

log = logging.getLogger(__name__)


class FetchRequest(NamedTuple):
    """What the framework wants read.

    Attributes:
        request_id: The framework's name; reported back once.
        transfer_id: Prefill's name.
        peer: Where prefill's node of our rank is.
        wanted: Own pages to fill, one run per group; what lies before a run is here already.
        tokens: Length of the prompt.
        prompt_key: See `prompt_key.py`.
        readers: How many ranks read this transfer from that node.
    """

    request_id: str
    transfer_id: str
    peer: PeerRef
    wanted: tuple[PageRun, ...]
    tokens: int
    prompt_key: str
    readers: int = 1


class Results(NamedTuple):
    """Requests that ended since the last look; `failed` are some of them, with the reason."""

    received: set[str]
    failed: dict[str, str]


class _Fetch:
    """One request on its way."""

    def __init__(self, request: FetchRequest, reader: str, total: float) -> None:
        self.request = request
        self.reader = reader
        self.total = total  # when the request's total is over
        self.deadline = total  # when the present state has lasted too long
        self.state = FetchState.WAITING
        self.peer: Peer | None = None
        self.attempt = 0
        self.grant = b""
        # Per group: (own ids, prefill's ids) of pages that are wanted, offered and not read.
        self.unread: list[list[tuple[Uint64s, Uint64s]]] = []
        self.arrived = 0  # own pages whose bytes are here
        self.last = False
        self.batch: Batch | None = None
        self.error = ""
        self.kind = ""  # the error as a metric's label


class DecodeSide:
    """All requests that this rank fetches."""

    def __init__(
        self,
        config: ConnectorConfig,
        engine: TransferEngine,
        groups: Sequence[GroupSpec],
        peers: Peers,
        stats: Stats,
        post: Callable[..., None],
        now: Callable[[], float],
        identity: str,
    ) -> None:
        """`post(fn, *args)` runs fn on the loop, from any thread; `identity` names this rank."""
        self._config = config
        self._engine = engine
        self._kinds = [group.kind for group in groups]
        self._peers = peers
        self._stats = stats
        self._post = post
        self._now = now
        self._identity = identity
        self._fetches: dict[str, _Fetch] = {}  # by request id
        self._by_reader: dict[str, _Fetch] = {}
        self._lock = threading.Lock()  # guards _results
        self._results = Results(set(), {})

    # ---- any thread

    def take_results(self) -> Results:
        """Requests that ended since the last call, each named once."""
        if not self._results.received:  # an idle engine asks several hundred times a second
            return _NOTHING
        with self._lock:
            results, self._results = self._results, Results(set(), {})
            return results

    # ---- the node's loop

    def claim(self, transfer_id: str, peer: PeerRef) -> None:
        """Keep a hold alive for a request that still queues here."""
        self._peers.get(peer).send(wire.Claim(transfer_id=transfer_id))

    def decline(self, transfer_id: str, request_id: str, peer: PeerRef) -> None:
        """Nothing of this transfer is needed (any more): prefill may free."""
        self._peers.get(peer).send(
            wire.Release(
                transfer_id=transfer_id, attempt=0, reader=self._reader(request_id), ok=False
            )
        )

    def fetch(self, request: FetchRequest) -> None:
        """Begin; the request is reported exactly once, whatever happens."""
        fetch = _Fetch(
            request,
            self._reader(request.request_id),
            self._now() + self._config.request_timeout_s,
        )
        self._fetches[request.request_id] = fetch
        self._by_reader[fetch.reader] = fetch
        self._subscribe(fetch)

    def cancel(self, request_id: str) -> None:
        """The framework no longer wants it; it is still reported once, after own reads ended."""
        fetch = self._fetches.get(request_id)
        if fetch is not None:
            self._apply(fetch, FetchEvent.ABORT)

    def on_message(self, peer: Peer, message: wire.AnyMessage) -> None:
        """A prefill node said something."""
        match message:
            case wire.Ready() | wire.Gone() | wire.Released():
                fetch = self._by_reader.get(message.reader)
                if fetch is not None and fetch.peer is peer:
                    self._dispatch(fetch, message)
            case wire.Ping():
                pass
            case _:
                raise WireError(f"an unexpected {type(message).__name__}")

    def on_peer_lost(self, peer: Peer, reason: str) -> None:
        """The connection to a prefill node ended, or never came about."""
        for fetch in [f for f in self._fetches.values() if f.peer is peer]:
            self._fail(fetch, FetchEvent.PEER_LOST, "prefill_gone", f"prefill {reason}")

    def sweep(self) -> None:
        """End what is over; called several times a second."""
        now = self._now()
        for fetch in [f for f in self._fetches.values() if f.deadline <= now]:
            limit = self._config.request_timeout_s
            if fetch.state in (FetchState.CONFIRMING, FetchState.REFUSED):
                limit = self._config.peer_dead_after_s
            doing = fetch.state.name.lower()
            self._fail(fetch, FetchEvent.GIVE_UP, "timeout", f"still {doing} after {limit:g} s")
            fetch.deadline = float("inf")  # what is left is bounded by the engine's time-out

    async def drain(self) -> None:
        """Fail every fetch; returns when no own read touches our pages any more."""
        for fetch in list(self._fetches.values()):
            self._fail(fetch, FetchEvent.GIVE_UP, "drained", "the KV cache's memory is taken away")
        await self.close()

    async def close(self) -> None:
        """Cancel every own read and wait until none touches our pages; reports nothing."""
        batches = [fetch.batch for fetch in self._fetches.values() if fetch.batch is not None]
        for batch in batches:
            batch.cancel()
        for batch in batches:
            await batch

    # ---- inside

    def _reader(self, request_id: str) -> str:
        return f"{self._identity}/{request_id}"

    def _subscribe(self, fetch: _Fetch) -> None:
        fetch.attempt, fetch.grant, fetch.arrived, fetch.last = 0, b"", 0, False
        fetch.deadline = fetch.total
        fetch.unread = [[] for _ in self._kinds]
        request = fetch.request
        peer = fetch.peer = self._peers.get(request.peer)
        peer.send(
            wire.Subscribe(
                transfer_id=request.transfer_id,
                reader=fetch.reader,
                readers=request.readers,
                first=tuple(run.first for run in request.wanted),
                tokens=request.tokens,
                prompt_key=request.prompt_key,
                remaining_s=max(0.0, fetch.deadline - self._now()),
            )
        )

    def _dispatch(self, fetch: _Fetch, message: wire.Ready | wire.Gone | wire.Released) -> None:
        match message:
            case wire.Ready():
                if fetch.attempt not in (0, message.attempt) or fetch.last:
                    return  # of an attempt that is over
                self._offered(fetch, message)
            case wire.Gone():
                if message.attempt not in (0, fetch.attempt) and fetch.attempt:
                    return
                event = FetchEvent.GONE_RETRY if message.retry else FetchEvent.GONE
                if fetch.state is FetchState.REFUSED:
                    fetch.error = ""  # the notice says better why the read was refused
                self._fail(fetch, event, "gone", f"prefill gave it up: {message.reason}")
            case wire.Released():
                if message.attempt != fetch.attempt:
                    return
                if message.held:
                    self._apply(fetch, FetchEvent.HELD)
                else:
                    self._fail(
                        fetch,
                        FetchEvent.EXPIRED,
                        "expired",
                        "prefill's pages were given away while they were read; the bytes are "
                        "thrown away",
                    )

    def _offered(self, fetch: _Fetch, message: wire.Ready) -> None:
        """Note which of the pages in `message` are wanted."""
        if len(message.pages) != len(self._kinds):
            raise WireError(
                f"pages of {len(message.pages)} groups, this cache has {len(self._kinds)}"
            )
        fetch.attempt, fetch.grant, fetch.last = message.attempt, message.grant, message.last
        for group, pages in enumerate(message.pages):
            offered, wanted = wire.unpack_pages(pages), fetch.request.wanted[group]
            own, theirs = plan.overlap(wanted, offered)
            if len(own):
                fetch.unread[group].append((own, theirs))
            rows, needed = len(offered.ids), len(wanted.ids)
            if self._kinds[group] == "state" and message.last and needed not in (0, rows):
                # Its rows have no positions of their own: only lists of one length match.
                error = f"prefill offered {rows} rows of state, {needed} are needed"
                self._fail(fetch, FetchEvent.GIVE_UP, "state_differs", error)
                return
        if any(fetch.unread):
            self._apply(fetch, FetchEvent.PAGES)
        elif fetch.last:
            self._nothing_left(fetch)

    def _nothing_left(self, fetch: _Fetch) -> None:
        """All that was offered is read: is it all that was wanted?"""
        missing = sum(len(run.ids) for run in fetch.request.wanted) - fetch.arrived
        if missing > 0:
            self._fail(
                fetch,
                FetchEvent.GIVE_UP,
                "short",
                f"prefill offered {missing} pages less than needed",
            )
        else:
            self._apply(fetch, FetchEvent.NOTHING_LEFT)

    def _fail(self, fetch: _Fetch, event: FetchEvent, kind: str, error: str) -> None:
        if not fetch.error:
            fetch.kind, fetch.error = kind, error
        self._apply(fetch, event)

    def _apply(self, fetch: _Fetch, event: FetchEvent) -> None:
        fetch.state, actions = step(FETCH_TABLE, fetch.state, event)
        for action in actions:
            match action:
                case FetchAction.READ:
                    self._read(fetch)
                case FetchAction.CANCEL_READ:
                    if fetch.batch is not None:
                        fetch.batch.cancel()
                case FetchAction.SUBSCRIBE_ANEW:
                    log.info("fetch %s starts over: %s", fetch.request.request_id, fetch.error)
                    fetch.kind = fetch.error = ""
                    self._subscribe(fetch)
                case FetchAction.RELEASE:
                    self._expect_word_soon(fetch)
                    self._release(fetch, ok=True)
                case FetchAction.RELEASE_UNREAD:
                    self._release(fetch, ok=False)
                case FetchAction.REPORT_RECEIVED:
                    if event is FetchEvent.HELD:  # else the framework gave it up
                        self._stats.received()
                    self._report(fetch, failed=False)
                case FetchAction.REPORT_FAILED:
                    self._report(fetch, failed=True)

    def _expect_word_soon(self, fetch: _Fetch) -> None:
        """Prefill answers at once or is not well: do not wait for it as long as for a prompt."""
        fetch.deadline = min(fetch.total, self._now() + self._config.peer_dead_after_s)

    def _release(self, fetch: _Fetch, *, ok: bool) -> None:
        assert fetch.peer is not None
        fetch.peer.send(
            wire.Release(
                transfer_id=fetch.request.transfer_id,
                attempt=fetch.attempt,
                reader=fetch.reader,
                ok=ok,
            )
        )

    def _read(self, fetch: _Fetch) -> None:
        """Submit one batch for what is offered and not read."""
        assert fetch.peer is not None
        peer, parts = fetch.peer, []
        try:
            for group in self._next_groups(fetch):
                for own, theirs in fetch.unread[group]:
                    fetch.arrived += len(own)
                    parts.append(plan.transfers(peer.own[group], peer.tables[group], own, theirs))
                fetch.unread[group] = []
            moves = plan.join(parts)
            fetch.batch = self._engine.submit(
                "read",
                peer.segment,
                moves.local,
                moves.remote,
                moves.lengths,
                grant=fetch.grant,
                timeout=max(0.001, fetch.deadline - self._now()),
            )
        except (EngineError, ValueError) as exc:
            fetch.batch = None
            # Posted: the table must reach READING before its read fails.
            self._post(self._fail, fetch, FetchEvent.READ_FAILED, "read", f"cannot read: {exc}")
            return
        log.debug(
            "reading %d bytes of transfer %s for request %s",
            fetch.batch.nbytes,
            fetch.request.transfer_id,
            fetch.request.request_id,
        )
        fetch.batch.add_done_callback(lambda done: self._post(self._on_batch, fetch, done))

    def _next_groups(self, fetch: _Fetch) -> list[int]:
        """Which groups to read now: a request's metadata says that all else is here."""
        unread = [group for group, pages in enumerate(fetch.unread) if pages]
        return [group for group in unread if self._kinds[group] != "metadata"] or unread

    def _on_batch(self, fetch: _Fetch, done: Completion) -> None:
        fetch.batch = None
        if not done.ok:
            event = FetchEvent.READ_FAILED
            if done.status is Status.REFUSED and fetch.state is FetchState.READING:
                event = FetchEvent.READ_REFUSED
                self._expect_word_soon(fetch)
            self._fail(fetch, event, "read", f"reading by {done.path.scheme}: {done.error}")
            return
        self._stats.batch(done)
        if any(fetch.unread):
            self._apply(fetch, FetchEvent.READ_MORE)
        elif not fetch.last:
            self._apply(fetch, FetchEvent.READ_WAIT)
        elif fetch.arrived < sum(len(run.ids) for run in fetch.request.wanted):
            self._fail(fetch, FetchEvent.READ_FAILED, "short", "prefill offered too few pages")
        else:
            self._apply(fetch, FetchEvent.READ_ALL)

    def _report(self, fetch: _Fetch, *, failed: bool) -> None:
        request = fetch.request
        del self._fetches[request.request_id]
        del self._by_reader[fetch.reader]
        if failed:
            self._stats.failure(fetch.kind)
            log.warning(
                "KV of request %s (transfer %s from %s) was not received: %s",
                request.request_id,
                request.transfer_id,
                request.peer,
                fetch.error,
            )
        with self._lock:
            self._results.received.add(request.request_id)
            if failed:
                self._results.failed[request.request_id] = fetch.error


_NOTHING = Results(set(), {})
