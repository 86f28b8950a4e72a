"""`TransferEngine`: registers memory, opens peers, submits transfers. Decides little itself."""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
from typing import TYPE_CHECKING

from mooncake_engine import slicing
from mooncake_engine.device import describe, is_device, pages
from mooncake_engine.directory import Directory
from mooncake_engine.errors import InvalidTransfer, PathUnavailable
from mooncake_engine.grants import GrantTable
from mooncake_engine.hosts import machine_id
from mooncake_engine.memory import RegionTable
from mooncake_engine.peers import Peers
from mooncake_engine.prepared import Office, PreparedTransfer
from mooncake_engine.segment import Routes, connect
from mooncake_engine.transport import registry
from mooncake_engine.types import Op, Region, SegmentRecord

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from types import TracebackType
    from typing import Self

    import numpy as np
    from numpy.typing import ArrayLike, NDArray

    from mooncake_engine.batch import Batch
    from mooncake_engine.config import EngineConfig
    from mooncake_engine.metadata.base import MetadataStore
    from mooncake_engine.segment import Segment
    from mooncake_engine.stats import Key, Totals
    from mooncake_engine.transport.base import Transport
    from mooncake_engine.types import Completion

_OPS: dict[str, Op] = {op.value: op for op in Op}

_log = logging.getLogger(__name__)


class TransferEngine:
    """Moves bytes between memory registered here and memory registered by peers.

    Safe to use from any thread. Close it, or use it as a context manager.

    Attributes:
        config: As given.
        name: Under which peers find this engine.
        incarnation: Random per start.
        store: The metadata store in use.
        transports: Those that started, by scheme. Test tools replace entries before a segment is
            opened (`mooncake_engine.testing.faults`).
    """

    def __init__(
        self, config: EngineConfig, *, name: str = "", store: MetadataStore | None = None
    ) -> None:
        """Start the transports that `config.protocol` permits and publish an empty record.

        Args:
            config: Settings.
            name: Name of our segment; empty: p2p's own address, else host, pid and random.
            store: Used instead of the one that `config.metadata` describes; stays the caller's.

        Raises:
            ConfigError: A protocol or a name that cannot be.
            PathUnavailable: No permitted transport starts on this machine.
            MetadataError: The store cannot be reached.
        """
        self.config = config
        self.incarnation = secrets.token_hex(16)
        self.transports: dict[str, Transport] = {}
        self._not_started: dict[str, str] = {}
        self._machine = machine_id()
        self._regions = RegionTable()
        self._grants = GrantTable()
        self._office = Office(
            self._regions,
            config.transfer_timeout_s,
            lambda name: self._directory.look_up(name),  # it is opened below
        )
        # One change at a time: memory that comes back must have left the transports before.
        self._changing = threading.Lock()
        self._peers = Peers(self._connect)
        with contextlib.ExitStack() as opening:
            self._start_transports(opening)
            opening.callback(self._office.inflight.close)
            opening.callback(self._peers.close)
            self._directory = Directory(config, name, store)
            opening.callback(self._directory.close)
            self.name, self.store = self._directory.name, self._directory.store
            self._publish()
            self._opened = opening.pop_all()

    def _start_transports(self, opening: contextlib.ExitStack) -> None:
        config = self.config
        for scheme in registry.preference(config.protocol, strict=config.strict_transport):
            kind = registry.load(scheme)
            try:
                transport = kind(config, self._regions, self._grants, self.incarnation)
            except PathUnavailable as error:
                # The text: whoever keeps a log record of the error keeps its frames, and memory.
                self._not_started[scheme] = why = str(error)
                if scheme == config.protocol:
                    raise PathUnavailable(
                        f"protocol {scheme} cannot be had on this machine: {why}; or set protocol "
                        "auto, which takes the best of what there is"
                    ) from None
                _log.info("this engine goes without %s: %s", scheme, why)
                continue
            opening.callback(transport.close)
            self.transports[scheme] = transport
        if not self.transports:
            reasons = "; ".join(f"{scheme}: {why}" for scheme, why in self._not_started.items())
            raise PathUnavailable(f"no transport starts on this machine: {reasons}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Withdraw our record, cancel every batch, wait for lanes, stop serving. Idempotent.

        Blocks until no thread of ours touches registered memory. From a done callback the
        calling thread itself cannot be waited for; it ends when the callback returns.
        """
        self._office.close()
        self._opened.close()

    def _check_open(self) -> None:
        self._office.check_open()

    # Memory.

    def register_memory(
        self,
        memory: object,
        length: int | None = None,
        location: str = "cpu",
        *,
        page_bytes: int = 0,
    ) -> Region:
        """Let peers and our own transfers use this memory; publishes the new record.

        Args:
            memory: An address (with `length` in bytes), a contiguous numpy array or torch tensor.
                Arrays and tensors are kept alive until unregistered; memory behind a bare address
                is the caller's to keep.
            length: Bytes; only needed for an address.
            location: "cpu" or "cuda:N"; a tensor knows its own.
            page_bytes: Transfers take whole pages of so many bytes, counted from its start: where
                a NIC needs several registrations for it, no page straddles two. 0: anything.

        Raises:
            InvalidTransfer: Not contiguous, empty, or overlapping another region.
            PathUnavailable: Device memory, and no started transport reaches such; or a transport
                cannot register it (a limit of locked memory, or of a NIC).
            MetadataError: The store refuses the record; the memory is then not registered.
        """
        self._check_open()
        region = describe(memory, length, location, page_bytes)
        if is_device(region.location) and not any(
            transport.capabilities.device_memory for transport in self.transports.values()
        ):
            raise PathUnavailable(
                f"cannot register memory on {region.location}: none of the transports "
                f"{', '.join(self.transports)} reaches device memory; keep it on the CPU, or run "
                "where a transport that does is available"
            )
        reached: list[Transport] = []
        with self._changing:
            self._regions.add(region)
            try:
                for transport in sorted(self.transports.values(), key=_pages_last):
                    transport.register(region)
                    reached.append(transport)
                self._publish()
            except BaseException:
                self._regions.remove(region.address)
                _unregister(region, reached)
                raise
        return region

    def unregister_memory(self, region: Region | int) -> None:
        """Take back a region (or the one that starts at an address).

        Peers' transfers that touch it are interrupted and have left when this returns.

        Raises:
            InvalidTransfer: No such region, or a batch of ours still uses it: cancel and wait.
            PathUnavailable: A NIC does not let go of it; keep the memory until `close`.
        """
        self._check_open()
        address = region.address if isinstance(region, Region) else region
        with self._changing:
            inflight = self._office.inflight
            with inflight.lock:  # no submit between the look and the removal
                batch = inflight.touching(self._regions.at(address))
                if batch is not None:
                    raise InvalidTransfer(
                        f"cannot unregister the region at {address:#x}: {batch!r} uses it; "
                        "cancel the batch and wait for its completion first"
                    )
                removed = self._regions.remove(address)
            try:
                _unregister(removed, self.transports.values())
            finally:
                self._publish()

    def allocate(self, length: int) -> NDArray[np.uint8]:
        """`length` zero bytes, page aligned and registered, of the kind that peers reach best.

        Peers on this machine can map it when the shm transport is on. Registered means kept
        alive; unregister it by its region's address.
        """
        self._check_open()
        if length <= 0:
            raise InvalidTransfer(f"cannot allocate {length} bytes; ask for more than 0")
        offers = (transport.allocate(length) for transport in self.transports.values())
        memory = next((offer for offer in offers if offer is not None), None)
        if memory is None:
            memory = pages(length)
        self.register_memory(memory)
        return memory

    # Peers.

    def record(self) -> SegmentRecord:
        """All that a peer needs to reach this engine, as of now."""
        return SegmentRecord(
            name=self.name,
            incarnation=self.incarnation,
            machine_id=self._machine,
            regions=self._regions.records(),
            endpoints={scheme: t.endpoint() for scheme, t in self.transports.items()},
        )

    def _publish(self) -> None:
        self._directory.publish(self.record)

    def open_segment(self, peer: str | SegmentRecord, *, protocol: str | None = None) -> Segment:
        """Reach a peer by its name in the metadata store, or by its record.

        Blocks up to the connect time-out of each transport tried. The same peer, incarnation and
        protocol give the same segment; a new incarnation ends the old one's batches PEER_GONE.

        Args:
            peer: Name or record.
            protocol: Only this transport, whatever the config prefers.

        Raises:
            UnknownSegment: No such name in the store.
            PathUnavailable: No permitted transport reaches it; gives each one's reason.
            ConfigError: No transport of that name.
            MetadataError: The store cannot be reached.
        """
        self._check_open()
        record = self._directory.look_up(peer) if isinstance(peer, str) else peer
        return self._peers.open(record, protocol)

    def _connect(self, record: SegmentRecord, protocol: str | None) -> Segment:
        return connect(
            record,
            registry.preference(
                protocol or self.config.protocol,
                strict=protocol is not None or self.config.strict_transport,
            ),
            Routes(self.transports, self._not_started, self.record),
        )

    # Transfers.

    def submit(
        self,
        op: Op | str,
        segment: Segment,
        local: ArrayLike | Sequence[tuple[int, int, int]],
        remote: ArrayLike | None = None,
        lengths: ArrayLike | None = None,
        grant: bytes = b"",
        timeout: float | None = None,
    ) -> Batch:
        """Start a transfer; returns at once.

        It may have ended by then: where that never waits for the peer (shm), the calling thread
        moves a small batch itself.

        The arrays are copied. Runs may come in any order; sources may overlap, destinations not.
        One thing may take the store's time-out: an address outside the peer's known regions makes
        us look its record up once more, as it may have registered memory since.

        Args:
            op: "read" (remote to local) or "write".
            segment: The peer.
            local: Addresses in this process, uint64 of shape (n,); or, alone, a list of
                (local address, remote address, length) tuples.
            remote: Addresses in the peer's process, shape (n,).
            lengths: Bytes of each run, > 0, shape (n,).
            grant: Permission of the peer, opaque; empty: none needed beyond registration.
            timeout: Seconds until TIMED_OUT; default `config.transfer_timeout_s`.

        Raises:
            InvalidTransfer: Arrays that describe no transfer.
            OutOfBounds: An address that its side has not registered.
            PathUnavailable: The segment's transport cannot do this.
            EngineClosed: The engine was closed.
        """
        return self.prepare(op, segment, local, remote, lengths, grant).submit(timeout)

    def transfer(
        self,
        op: Op | str,
        segment: Segment,
        local: ArrayLike | Sequence[tuple[int, int, int]],
        remote: ArrayLike | None = None,
        lengths: ArrayLike | None = None,
        grant: bytes = b"",
        timeout: float | None = None,
    ) -> Completion:
        """`submit` and `wait` in one call, which is quicker: this thread moves bytes itself.

        It takes part like a lane's own thread, as long as a lane is idle and no other batch waits
        for one. A batch of one small slice then wakes no thread at all. Arguments and errors are
        those of `submit`; how the transfer ended is in the completion.
        """
        return self.prepare(op, segment, local, remote, lengths, grant).transfer(timeout)

    def prepare(
        self,
        op: Op | str,
        segment: Segment,
        local: ArrayLike | Sequence[tuple[int, int, int]],
        remote: ArrayLike | None = None,
        lengths: ArrayLike | None = None,
        grant: bytes = b"",
    ) -> PreparedTransfer:
        """A transfer to run later, several times: what can be worked out before is, once.

        Moves nothing and keeps no memory registered: each run is checked anew against what is.
        Arguments and errors are those of `submit`.
        """
        self._check_open()
        op = _known_op(op, segment)
        given = slicing.descriptors(local, remote, lengths)
        return PreparedTransfer(self._office, segment, op, given, grant)

    def grant(self, token: bytes) -> None:
        """Serve slices that carry `token` from now on."""
        self._check_open()
        self._grants.add(token)

    def revoke(self, token: bytes) -> None:
        """Serve `token` no more; when this returns nobody is being served under it. Idempotent."""
        self._grants.revoke(token)

    def statistics(self) -> dict[Key, Totals]:
        """Sums over ended batches by (scheme, op, status)."""
        return self._office.statistics()


def _pages_last(transport: Transport) -> bool:
    """Sorts those who put other pages under a region before those who may pin them."""
    return not transport.capabilities.exchanges_pages


def _unregister(region: Region, transports: Iterable[Transport]) -> None:
    """From all of them, also when one refuses."""
    with contextlib.ExitStack() as leaving:
        for transport in transports:
            leaving.callback(transport.unregister, region)


def _known_op(op: Op | str, segment: Segment) -> Op:
    known = _OPS.get(op)
    if known is None:
        raise InvalidTransfer(f"operation {op!r}: use 'read' or 'write'")
    if known not in segment.capabilities.ops:
        raise PathUnavailable(f"{segment.path.scheme} cannot {known}; open another path")
    return known
