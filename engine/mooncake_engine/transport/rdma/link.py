"""One peer over RDMA: the rails to it and their endpoints."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

from typing_extensions import override

from mooncake_engine.errors import LaneError
from mooncake_engine.topology.rails import NicPair
from mooncake_engine.transport import sockets
from mooncake_engine.transport.base import Lane, Link
from mooncake_engine.transport.rdma import rails as rails_module
from mooncake_engine.transport.rdma.control import Control
from mooncake_engine.transport.rdma.endpoint import Endpoint, Failure, State
from mooncake_engine.transport.rdma.lane import RdmaLane
from mooncake_engine.transport.rdma.messages import Accepted, Disconnect, Proven, Refused
from mooncake_engine.transport.rdma.rails import Rail
from mooncake_engine.transport.rdma.verbs.base import VerbsError
from mooncake_engine.types import Status

if TYPE_CHECKING:
    from mooncake_engine.transport.rdma.job import Job
    from mooncake_engine.transport.rdma.rails import Rails
    from mooncake_engine.transport.rdma.records import RdmaEndpoint
    from mooncake_engine.transport.rdma.shared import Shared

_log = logging.getLogger(__name__)

#: A failed endpoint's requests complete as flushed within milliseconds; what does not is given up
#: by destroying its queue pairs.
_FLUSH_S = 5.0
#: Less says more about the latency than about the rate.
_WORTH_NOTING = 256 << 10
#: Told of a peer to whom every rail is down; a machine with 8 NICs has 64 rails.
_MOST_REASONS = 8


class RdmaLink(Link):
    """Safe to call from any thread."""

    #: Each lane has one slice under way; two keep the NIC busy while the other is being posted.
    lanes = 2

    def __init__(self, shared: Shared, name: str, incarnation: str, peer: RdmaEndpoint) -> None:
        """Connect to the peer and ask for its keys; endpoints are made when they are needed.

        Raises:
            PathUnavailable: Nobody there, somebody else, or no pair of NICs that fit.
        """
        self.shared = shared
        self.peer = peer
        self.name = f"{name} at {sockets.host_port(peer.host, peer.port)}"
        self.rails: Rails = shared.rails(name, peer)
        self._incarnation = incarnation
        self._lock = threading.Lock()  # guards all below
        self._by_token: dict[int, Endpoint] = {}
        self._failed: list[tuple[Endpoint, float]] = []  # and when it failed
        self._probing: set[Rail] = set()  # rails that rested and are being tried
        self._reasons: dict[Rail, str] = {}  # why rails failed that have not worked since
        self._turn = 0
        self._rate = 0.0
        self._only: Rail | None = None
        self.control = Control(
            self.name,
            incarnation,
            peer,
            shared.connect_timeout_s,
            on_answer=self._on_answer,
            on_gone=self._on_gone,
        )
        self.control.start()
        self._prepare()

    def _prepare(self) -> None:
        """Start the endpoints that the first transfer will use; waits for none of them."""
        ours = set(self.shared.registrations.snapshot.locations.tolist()) or {"cpu"}
        theirs = set(self.control.keys[1]) or {"cpu"}
        for rail in {rail for a in ours for b in theirs for rail in self.rails_of(a, b)}:
            self.endpoint(rail)

    @override
    def open_lane(self) -> Lane:
        if self.control.gone:
            raise LaneError(Status.PEER_GONE, self.control.gone)
        return RdmaLane(self)

    @override
    def close(self) -> None:
        self.control.close()
        with self._lock:
            endpoints = [*self._by_token.values(), *(endpoint for endpoint, _ in self._failed)]
            self._failed.clear()
        for endpoint in endpoints:
            endpoint.close()
            self.shared.forget(endpoint, self._incarnation)

    def rails_of(self, local: str, remote: str) -> tuple[Rail, ...]:
        """Rails to use between memory at two locations; none: all of them rest or are tried."""
        with self._lock:
            now = time.monotonic()
            if self._only is not None:
                up = self.rails.state(self._only, now) == "up"
                return (self._only,) if up else ()
            due = self.rails.probes(now)
            self._probing.update(due)
            rails = self.rails.choose(local, remote, now)
        for rail in due:
            endpoint = self.endpoint(rail, proving=True)
            if endpoint is not None and endpoint.state is State.READY:  # made before it rested
                self._on_state(endpoint, State.READY)
        return rails

    def share(self, rows: slice, rails: tuple[Rail, ...]) -> list[tuple[Rail, slice]]:
        """Spread requests over rails."""
        with self._lock:
            self._turn += 1
            turn = self._turn
        shares = rails_module.share(rows.stop - rows.start, rails, turn=turn)
        return [
            (rail, slice(rows.start + part.start, rows.start + part.stop)) for rail, part in shares
        ]

    def nic_pairs(self) -> list[NicPair]:
        """All pairs of one of our NICs and one of the peer's."""
        return [
            NicPair(context.record.name, device.name, device.numa_node)
            for context in self.shared.contexts
            for device in self.peer.devices
        ]

    def restrict(self, pair: NicPair | None) -> None:
        """Use this pair alone from now on; None: all again. For measuring."""
        ours = [context.record.name for context in self.shared.contexts]
        theirs = [device.name for device in self.peer.devices]
        with self._lock:
            self._only = None
            if pair is not None:
                self._only = Rail(ours.index(pair.local), theirs.index(pair.remote))
                self.rails.forgive(self._only)

    def trying(self, job: Job) -> bool:
        """Some rail that rested is being tried; `job` is woken when that ends."""
        with self._lock:
            rails = tuple(self._probing)
        for rail in rails:
            endpoint = self.endpoint(rail)  # and fails it when its time is over
            if endpoint is None or endpoint.wait_for(job) not in {State.CONNECTING, State.PROVING}:
                job.wake()
        return bool(rails)

    @property
    def why_down(self) -> str:
        """Why each rail that does not work failed last; those never tried have no reason."""
        with self._lock:
            reasons = list(self._reasons.values())
        more = len(reasons) - _MOST_REASONS
        return "; ".join([*reasons[:_MOST_REASONS], *([f"and {more} more"] if more > 0 else [])])

    @property
    def rate(self) -> float:
        """Bytes a second of a lane, of late."""
        return self._rate

    def note_rate(self, nbytes: int, seconds: float) -> None:
        """A lane moved so much in that time."""
        if nbytes >= _WORTH_NOTING:
            self._rate += 0.25 * (nbytes / max(seconds, 1e-6) - self._rate)

    def endpoint(self, rail: Rail, *, proving: bool = False) -> Endpoint | None:
        """The endpoint of a rail, made if there is none; None: the rail is down.

        A rail that rests gets a new one only to prove it.
        """
        with self._lock:
            endpoint = self.shared.find(rail, self._incarnation)
            made = endpoint is None
            if endpoint is None:
                up = self.rails.state(rail, time.monotonic()) == "up"
                if not (proving or up):
                    return None
                try:
                    endpoint = self._make(rail)
                except VerbsError as error:
                    self._probing.discard(rail)
                    why = f"{self._named(rail)}: no queue pairs: {error.strerror}"
                    if self._rail_failed(rail, why):
                        _log.warning("a rail to %s failed: %s", self.name, why)
                    return None
                self._by_token[endpoint.token] = endpoint
                evicted = self.shared.keep(endpoint, self._incarnation)
        if made:
            for old in evicted:
                old.close()
            self.reap()
            self.control.send(endpoint.request())
        elif endpoint.state is not State.READY and time.monotonic() > endpoint.deadline:
            endpoint.fail(
                Failure(
                    f"{endpoint.name} was not ready within {self.shared.connect_timeout_s:g} s "
                    f"({endpoint.state.value})",
                    rail=True,
                )
            )
        return endpoint

    def _make(self, rail: Rail) -> Endpoint:
        return Endpoint(
            self.shared.contexts[rail.local],
            rail,
            self.peer.devices[rail.remote],
            deadline=time.monotonic() + self.shared.connect_timeout_s,
            on_state=self._on_state,
        )

    def _on_state(self, endpoint: Endpoint, state: State) -> None:
        if state is State.READY:
            self._rail_works(endpoint)
            return
        new = False
        with self._lock:
            self._probing.discard(endpoint.rail)
            self.shared.forget(endpoint, self._incarnation)
            self._by_token.pop(endpoint.token, None)
            self._failed.append((endpoint, time.monotonic()))
            failure = endpoint.failure
            if failure is not None and failure.rail:
                new = self._rail_failed(endpoint.rail, failure.reason)
        if failure is not None and new:
            _log.warning("a rail to %s failed: %s", self.name, failure.reason)
        self.control.send(Disconnect(endpoint.token))

    def _named(self, rail: Rail) -> str:
        """As `Endpoint.name`."""
        ours = self.shared.contexts[rail.local].record.name
        return f"{ours} -> {self.peer.devices[rail.remote].name}"

    def _rail_works(self, endpoint: Endpoint) -> None:
        rail, now = endpoint.rail, time.monotonic()
        with self._lock:
            self._probing.discard(rail)
            self.rails.succeeded(rail, now)
            again = self.rails.state(rail, now) == "up" and self._reasons.pop(rail, "")
        if again:
            _log.warning("a rail to %s works again: %s", self.name, endpoint.name)

    def _rail_failed(self, rail: Rail, reason: str) -> bool:
        """Called with the lock held. True: it worked before, so that somebody should be told.

        A probe that fails is no news: there is one in each pause, for as long as the rail is down.
        """
        new = rail not in self._reasons
        self._reasons[rail] = reason
        self.rails.failed(rail, time.monotonic())
        return new

    def reap(self) -> None:
        """Destroy failed endpoints whose requests have come back, or never will."""
        now = time.monotonic()
        with self._lock:
            ripe = [e for e, since in self._failed if e.idle or now - since > _FLUSH_S]
            self._failed = [entry for entry in self._failed if entry[0] not in ripe]
        for endpoint in ripe:
            endpoint.close()

    # Told by the control connection's thread.

    def _on_answer(self, answer: Accepted | Refused | Proven) -> None:
        with self._lock:
            endpoint = self._by_token.get(answer.token)
        if endpoint is None:  # it failed meanwhile
            return
        match answer:
            case Accepted():
                endpoint.accepted(answer)
            case Proven(queue=queue):
                endpoint.proven(queue)
            case Refused(reason=reason):
                endpoint.fail(Failure(f"{endpoint.name} was refused: {reason}", rail=True))

    def _on_gone(self, reason: str) -> None:
        with self._lock:
            endpoints = list(self._by_token.values())
        for endpoint in endpoints:
            endpoint.fail(Failure(reason, rail=False))
