"""The `shm` transport: engines of one machine copy straight out of each other's memory.

The initiator's lanes do all the work; the target runs no thread unless it has arenas: memory that
its engine allocated (`ShmTransport.allocate`), or shared when it was registered. Two ways lead to
the peer's memory:

* process_vm_readv/writev by the peer's pid: reaches all of its memory, if the kernel permits;
* our mapping of the peer's arenas: needs no permission, and copies at the speed of memcpy.

Where both do, small slices go by pid, which needs no look at where the memory is mapped, and large
ones over the mapping, as long as it holds them.
"""

from __future__ import annotations

import abc
import contextlib
import logging
import os
import threading
from typing import TYPE_CHECKING, Annotated, ClassVar

import msgspec
from typing_extensions import override

from mooncake_engine import native
from mooncake_engine.device import is_device
from mooncake_engine.errors import (
    EngineClosed,
    EngineError,
    InvalidTransfer,
    LaneError,
    PathUnavailable,
)
from mooncake_engine.transport.base import BulkLink, Capabilities, Link, Transport
from mooncake_engine.transport.shm.arena import ArenaServer
from mooncake_engine.transport.shm.arena_reader import ArenaReader
from mooncake_engine.transport.shm.copier import Copier
from mooncake_engine.transport.shm.lane import ByMapping, ByPid, MappedFirst, ShmLane
from mooncake_engine.transport.shm.nonce import NONCE_BYTES, Nonce, NonceReader
from mooncake_engine.transport.shm.process_vm import CALL_BYTES, permit_any_reader
from mooncake_engine.transport.shm.shared_pages import SharedPages

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mooncake_engine.config import EngineConfig
    from mooncake_engine.grants import GrantTable
    from mooncake_engine.memory import RegionTable
    from mooncake_engine.native import Library
    from mooncake_engine.transport.shm.lane import Way
    from mooncake_engine.types import Region, SegmentRecord

logger = logging.getLogger(__name__)

VERSION = 1


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """What a peer of this machine needs. Who has it may read our registered memory."""

    version: int = VERSION
    pid: Annotated[int, msgspec.Meta(gt=0, le=(1 << 31) - 1)]
    nonce_address: Annotated[int, msgspec.Meta(gt=0, le=(1 << 63) - 1)]
    nonce: Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
    #: Abstract unix socket of the arena server; nobody listens there before there is an arena.
    arena: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9-]{1,64}$")]


class ShmLink(Link):
    """One peer of this machine, whose lanes copy and share no wire."""

    slice_bytes = CALL_BYTES

    def __init__(self, peer: str, threads: int, copier: Copier | None) -> None:
        """Args: threads: of a large batch; copier: of loops in C, where there are any."""
        self.lanes = threads
        self._peer = peer
        self._copier = copier
        if copier:
            self.bulk = BulkLink(lambda: self._lane(threads))

    @abc.abstractmethod
    def _way(self) -> Way:
        """A lane's own."""

    def _lane(self, threads: int) -> ShmLane:
        team = self._copier.team(threads) if self._copier else None
        return ShmLane(self._peer, self._way(), team)

    @override
    def open_lane(self) -> ShmLane:
        return self._lane(1)

    @override
    def close(self) -> None:
        """Nothing but lanes to close."""


class ByPidLink(ShmLink):
    """By the peer's pid: all of its memory. Large slices go over its arenas where those do."""

    def __init__(
        self,
        peer: str,
        threads: int,
        nonce: NonceReader,
        library: Library | None,
        reader: ArenaReader | None = None,
    ) -> None:
        """Args: reader: of its arenas, where there are any; closed together with the link."""
        super().__init__(peer, threads, Copier(library, nonce.owner) if library else None)
        self._nonce = nonce
        self._reader = reader
        if self._copier:
            self.at_once = self._copier.at_once
        if library and reader:
            mapped = Copier(library, reader.owner)
            self.bulk = BulkLink(
                lambda: MappedFirst(
                    ShmLane(peer, ByMapping(peer, reader), mapped.team(threads)),
                    self._lane(threads),
                )
            )

    @override
    def _way(self) -> Way:
        return ByPid(self._peer, self._nonce.another())

    @override
    def close(self) -> None:
        if self._reader:
            self._reader.close()


class ByMappingLink(ShmLink):
    """By our mapping of its arenas."""

    def __init__(
        self, peer: str, threads: int, reader: ArenaReader, library: Library | None
    ) -> None:
        """Args: reader: closed together with the link."""
        super().__init__(peer, threads, Copier(library, reader.owner) if library else None)
        self._reader = reader

    @override
    def _way(self) -> Way:
        return ByMapping(self._peer, self._reader)

    @override
    def close(self) -> None:
        self._reader.close()


class ShmTransport(Transport):
    """Same machine, one copy. The target has no say in a slice: the reader confirms its grant.

    With `config.shm.allow_any_reader` any process of this user may read this process where Yama
    would forbid it, and readers of other users who know our endpoint may map the arena. With
    `config.shm.share_registered` registered memory becomes an arena, too.
    """

    scheme: ClassVar[str] = "shm"
    capabilities: ClassVar[Capabilities] = Capabilities(
        same_machine_only=True, exchanges_pages=True
    )

    def __init__(
        self, config: EngineConfig, regions: RegionTable, grants: GrantTable, incarnation: str
    ) -> None:
        super().__init__(config, regions, grants, incarnation)
        self._nonce = Nonce()
        self._arena_name = f"mooncake-{os.urandom(16).hex()}"
        self._lock = threading.Lock()  # guards _server and _closed
        self._server: ArenaServer | None = None
        self._closed = False
        self._library = native.wanted("shm", use=config.shm.native)
        if config.shm.allow_any_reader:
            permit_any_reader()

    @override
    def endpoint(self) -> msgspec.Raw:
        endpoint = Endpoint(
            pid=os.getpid(),
            nonce_address=self._nonce.address,
            nonce=self._nonce.value,
            arena=self._arena_name,
        )
        return msgspec.Raw(msgspec.msgpack.encode(endpoint))

    @override
    def allocate(self, length: int) -> NDArray[np.uint8]:
        """`length` zeroed bytes at a page boundary that peers of this machine can map.

        The memory belongs to the arena until the transport closes, and to the array as long as
        that lives. It still has to be registered. Does not wait for peers.

        Raises:
            InvalidTransfer: When `length` is not positive.
            EngineClosed: After `close`.
            EngineError: When the machine has no such memory to give, or at a limit of the process.
        """
        if length <= 0:
            raise InvalidTransfer(f"cannot allocate {length} bytes: the length must be positive")
        with self._lock:
            if self._closed:
                raise EngineClosed("the shm transport is closed; it allocates no memory any more")
            try:
                return self._serving().allocate(length)
            except OSError as error:
                raise EngineError(
                    f"cannot allocate {length} bytes of shared memory: {error}; look at this "
                    "process's limits of descriptors and address space (ulimit -n, ulimit -v)"
                ) from error

    def _serving(self) -> ArenaServer:
        """Under the lock: the server, begun when it is first needed."""
        if self._server is None:
            self._server = ArenaServer(
                self._arena_name,
                self._nonce.value,
                self.config.connect_timeout_s,
                any_user=self.config.shm.allow_any_reader,
            )
        return self._server

    @override
    def register(self, region: Region) -> None:
        """Share it, where that is wanted and can be; where not, peers reach it by our pid."""
        if not self.config.shm.share_registered or is_device(region.location):
            return
        with self._lock:
            try:
                server = self._serving()
                if not server.has(region.address):
                    server.share(region.address, SharedPages(region.address, region.length))
            except (EngineError, OSError) as error:
                logger.warning(
                    "%d bytes at %#x are not shared with peers of this machine, which reach them "
                    "by process_vm calls instead: %s",
                    region.length,
                    region.address,
                    str(error),  # a kept log record would keep the error's frames, and memory
                )

    @override
    def unregister(self, region: Region) -> None:
        with self._lock:
            if self._server:
                self._server.withdraw(region.address)

    @override
    def connect(self, peer: SegmentRecord) -> ShmLink:
        blob = peer.endpoints.get(self.scheme)
        if blob is None:
            raise PathUnavailable(f"{peer.name} publishes no shm endpoint: shm is off there")
        try:
            endpoint = msgspec.msgpack.decode(blob, type=Endpoint)
        except msgspec.DecodeError as error:
            raise PathUnavailable(
                f"the shm endpoint of {peer.name} cannot be read: {error}; run the same release "
                "on both sides"
            ) from error
        if endpoint.version != VERSION:
            raise PathUnavailable(
                f"{peer.name} speaks version {endpoint.version} of shm, this engine version "
                f"{VERSION}; run the same release on both sides"
            )
        threads = self.config.shm.threads
        nonce = NonceReader(endpoint.pid, endpoint.nonce_address, endpoint.nonce, peer.name)
        try:
            nonce.confirm()
        except LaneError as refusal:
            reader = self._map_arenas(peer, endpoint, refusal)
            return ByMappingLink(peer.name, threads, reader, self._library)
        if self._library:
            with contextlib.suppress(LaneError):  # it has none
                mapped = self._reader(peer, endpoint)
                return ByPidLink(peer.name, threads, nonce, self._library, mapped)
        return ByPidLink(peer.name, threads, nonce, self._library)

    def _reader(self, peer: SegmentRecord, endpoint: Endpoint) -> ArenaReader:
        return ArenaReader(peer.name, endpoint.arena, endpoint.nonce, self.config.connect_timeout_s)

    def _map_arenas(
        self, peer: SegmentRecord, endpoint: Endpoint, refusal: LaneError
    ) -> ArenaReader:
        """The second way, or `PathUnavailable` with the reasons of both."""
        try:
            reader = self._reader(peer, endpoint)
        except LaneError as error:
            raise PathUnavailable(f"{refusal}; and {error}") from error
        if not reader.covers(peer.regions):
            reader.close()
            raise PathUnavailable(
                f"{refusal}; and {peer.name} has registered memory that its engine did not "
                "allocate or share, which can be reached in no other way"
            )
        return reader

    @override
    def close(self) -> None:
        with self._lock:
            self._closed = True
            server, self._server = self._server, None
        self._nonce.close()
        if server is not None:
            server.close()
