"""A peer as this engine sees it: what it registered, and the link that reaches it."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, NamedTuple

from typing_extensions import override

from mooncake_engine.batch import Failure
from mooncake_engine.bulk import LendingLink
from mooncake_engine.device import is_device
from mooncake_engine.errors import PathUnavailable
from mooncake_engine.failover import FailoverLink, Route
from mooncake_engine.memory import Bounds
from mooncake_engine.slicing import MIN_SHARE
from mooncake_engine.types import Path, Status
from mooncake_engine.worker import LinkWorker

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mooncake_engine.transport.base import Transport
    from mooncake_engine.types import SegmentRecord, Uint64s

_log = logging.getLogger(__name__)


class Segment:
    """One incarnation of a peer over one path; made by `TransferEngine.open_segment`.

    Shared by all who open the same one: closing it ends it for all of them.
    """

    def __init__(
        self,
        record: SegmentRecord,
        route: Route,
        around: Callable[[SegmentRecord], Route] | None = None,
    ) -> None:
        """Args: around: connects another path when `route` is lost; None: not permitted."""
        self.path = route.path
        self.capabilities = route.capabilities
        self.link = FailoverLink(route, around and (lambda: around(self.record)))
        name = f"{route.path.scheme} to {record.name}"
        self._worker = LinkWorker(self.link, name)
        self._bulk: LinkWorker | None = None
        if self.link.bulk:
            self._bulk = LinkWorker(LendingLink(self.link.bulk, self._worker), f"{name}, bulk")
        self._lock = threading.Lock()  # guards the swap of all below
        #: The peer's record as last seen.
        self.record: SegmentRecord = record
        #: What it registered; another object after each `update`.
        self.bounds: Bounds = _bounds_of(record)
        self._closed = False

    @override
    def __repr__(self) -> str:
        return f"<Segment {self.name} over {self.path.scheme}>"

    @property
    def name(self) -> str:
        """The peer's name in the metadata store."""
        return self.record.name

    @property
    def incarnation(self) -> str:
        """Which start of the peer this is."""
        return self.record.incarnation

    @property
    def closed(self) -> bool:
        """Whether batches submitted now end at once without moving a byte."""
        return self._closed

    def update(self, record: SegmentRecord) -> None:
        """Take a newer record of the same incarnation."""
        if record.incarnation != self.incarnation:
            raise ValueError(f"{record.name} is another incarnation now; open it again")
        with self._lock:
            self.record, self.bounds = record, _bounds_of(record)

    def check(self, addresses: Uint64s, lengths: Uint64s) -> None:
        """Raise `OutOfBounds` unless the peer registered each run."""
        self.bounds.check(addresses, lengths, self.name)

    def worker(self, nbytes: int) -> LinkWorker:
        """Who moves a batch of that size."""
        return self._bulk if self._bulk is not None and nbytes > MIN_SHARE else self._worker

    def stop_all(self, failure: Failure) -> None:
        """End its batches and take no more. Returns at once; idempotent."""
        for worker in self._workers():
            worker.stop_all(failure)

    def _workers(self) -> list[LinkWorker]:
        return [worker for worker in (self._bulk, self._worker) if worker is not None]

    def close(self, failure: Failure | None = None) -> None:
        """End its batches (CANCELLED unless `failure` says otherwise), threads and sockets.

        Blocks until every lane let go of local memory. Idempotent.
        """
        with self._lock:
            self._closed = True
        failure = failure or Failure(Status.CANCELLED, f"the segment {self.name} was closed")
        self.stop_all(failure)  # all of them, before one is waited for
        for worker in self._workers():
            worker.close(failure)


def _bounds_of(record: SegmentRecord) -> Bounds:
    return Bounds((r.address, r.length) for r in record.regions)


class Routes(NamedTuple):
    """The transports that an engine has to reach its peers by.

    Attributes:
        transports: Those that started, by scheme.
        not_started: Why the others did not.
        own: The engine's own record, as of now.
    """

    transports: Mapping[str, Transport]
    not_started: Mapping[str, str]
    own: Callable[[], SegmentRecord]

    def find(self, peer: SegmentRecord, order: Sequence[str]) -> Route:
        """Connect the first path of `order` that reaches the peer; keep why the others did not.

        Raises:
            PathUnavailable: None does; the message gives each one's reason.
        """
        own = self.own()
        refusals: list[str] = []
        for scheme in order:
            transport = self.transports.get(scheme)
            if transport is None:
                why = self.not_started.get(scheme, "not started by this engine")
                refusals.append(f"{scheme}: {why}")
                continue
            refusal = refuse(transport, peer, own)
            if refusal is None:
                try:
                    link = transport.connect(peer)
                except PathUnavailable as error:
                    refusal = str(error)
            if refusal is not None:
                refusals.append(f"{scheme}: {refusal}")
                continue
            where = "same machine" if peer.machine_id == own.machine_id else "other machine"
            rest = order[len(refusals) + 1 :]
            untried = f"{', '.join(rest)} not tried" if rest else "no other is permitted"
            reason = "; ".join([where, *(refusals or [untried])])
            # What did not start was said when the engine started, once.
            told = [r for r in refusals if r.partition(":")[0] in self.transports]
            if told:
                _log.warning("%s is reached over %s, since %s", peer.name, scheme, "; ".join(told))
            return Route(Path(scheme, reason), link, transport.capabilities)
        raise PathUnavailable(f"no path to {peer.name}: {'; '.join(refusals)}")


def connect(peer: SegmentRecord, order: Sequence[str], routes: Routes) -> Segment:
    """Open the first path of `order` that reaches the peer; the rest stands in when it is lost.

    Raises:
        PathUnavailable: None does; the message gives each one's reason.
    """
    route = routes.find(peer, order)
    rest = order[order.index(route.path.scheme) + 1 :]
    return Segment(peer, route, (lambda latest: routes.find(latest, rest)) if rest else None)


def refuse(transport: Transport, peer: SegmentRecord, own: SegmentRecord) -> str | None:
    """Why a transport cannot serve this peer, as far as records tell; None: try to connect."""
    if transport.scheme not in peer.endpoints:
        return f"{peer.name} does not offer it"
    if transport.capabilities.same_machine_only and peer.machine_id != own.machine_id:
        return f"{peer.name} is on another machine"
    devices = {r.location for r in (*own.regions, *peer.regions) if is_device(r.location)}
    if devices and not transport.capabilities.device_memory:
        return f"it cannot reach memory on {', '.join(sorted(devices))}"
    return None
