"""The arenas of one peer, mapped here: the initiator's end of `arena.ArenaServer`."""

from __future__ import annotations

import array
import contextlib
import ctypes
import fcntl
import mmap
import os
import select
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from mooncake_engine.errors import LaneError
from mooncake_engine.transport.shm.arena import (
    FDS_PER_OFFER,
    MESSAGE_BYTES,
    VERSION,
    Hello,
    Offer,
    peer_credentials,
    proof,
)
from mooncake_engine.transport.shm.copier import Owner
from mooncake_engine.types import Status

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mooncake_engine.types import RegionRecord, Uint64s


class ArenaReader:
    """Maps a peer's arenas and knows whether the peer lives. Safe to call from any thread.

    A dead peer's pages stay readable in our mapping, so life is asked of the kernel: by a pidfd,
    and by the connection, which the peer closes together with its engine.
    """

    def __init__(self, peer: str, name: str, nonce: bytes, timeout_s: float) -> None:
        """Connect to the abstract socket `name` and map what is there; blocks up to `timeout_s`.

        Raises:
            LaneError: When there is no such peer, it refuses us, or it is silent.
        """
        self._peer = peer
        self._proof = proof(nonce, b"target")
        self._lock = threading.Lock()  # guards all below
        self._maps: dict[int, tuple[int, int, mmap.mmap]] = {}  # theirs: (length, ours, mapping)
        self._retired: list[mmap.mmap] = []  # withdrawn, but perhaps a slice is copying from it
        self._generation = 0
        self._index()
        self._gone = ""
        self._users = 0
        self._closed = False
        self._pidfd = -1
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._connect(name, nonce, time.monotonic() + timeout_s)
        except OSError as error:
            self.close()
            raise LaneError(
                Status.PEER_GONE, f"the arena of {peer} cannot be reached: {error}"
            ) from error
        except BaseException:
            self.close()
            raise

    def _connect(self, name: str, nonce: bytes, deadline: float) -> None:
        wait = struct.pack("ll", 1 + int(deadline - time.monotonic()), 0)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, wait)  # a full backlog
        self._socket.connect(b"\0" + name.encode())
        pid, _, _ = peer_credentials(self._socket)
        if not pid:
            raise LaneError(
                Status.REFUSED,
                f"{self._peer} lives in a pid namespace that this process cannot see, so its "
                "death would go unnoticed; share the pid namespace, or use tcp",
            )
        # An answer that comes after this proves that the pid was not given away before it:
        # the answering process is the one that the kernel named.
        self._pidfd = os.pidfd_open(pid)
        hello = Hello(VERSION, proof(nonce, b"reader"))
        self._socket.send(msgspec.msgpack.encode(hello), socket.MSG_NOSIGNAL)
        answer = select.poll()
        answer.register(self._socket, select.POLLIN)
        more = True
        while more:
            if not answer.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError("it did not answer in time")
            more = self._receive()
        if self._gone:
            raise ConnectionResetError(self._gone)

    @property
    def owner(self) -> Owner:
        """Whose arenas they are, as C takes it; until `close`."""
        return Owner(alive=(self._pidfd, self._socket.fileno()))

    def poller(self) -> select.poll:
        """A poll object for `confirm`; each thread needs its own."""
        poller = select.poll()
        poller.register(self._pidfd, select.POLLIN)
        poller.register(self._socket, select.POLLIN)
        return poller

    def confirm(self, poller: select.poll) -> None:
        """Raise `LaneError` PEER_GONE when the peer has died or closed its engine.

        What the mapping held before a call that returns was the memory of a living peer.
        """
        for fd, events in poller.poll(0):
            if fd == self._pidfd or events != select.POLLIN:
                with self._lock:
                    self._gone = self._gone or "its process has ended or closed its engine"
            else:
                self.learn()
        if self._gone:
            raise LaneError(Status.PEER_GONE, f"{self._peer} is gone: {self._gone}")

    def learn(self) -> None:
        """Map the arenas that the peer has offered since; does not wait."""
        with self._lock, contextlib.suppress(BlockingIOError):
            while not self._gone:
                self._receive()

    def _receive(self) -> bool:
        """Take one offer; True when the next follows at once. `BlockingIOError`: none there.

        Under the lock, so that whoever finds the socket empty and asks for the generation after
        that cannot miss what another thread has just taken out of it.
        """
        # Not socket.recv_fds, which drops its flags (CPython 3.11 to 3.13).
        flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        fds = array.array("i")
        try:
            message, control, _, _ = self._socket.recvmsg(
                MESSAGE_BYTES, socket.CMSG_LEN(FDS_PER_OFFER * fds.itemsize), flags
            )
        except BlockingIOError:
            raise
        except OSError as error:
            self._gone = str(error)
            return False
        for level, kind, data in control:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(data[: len(data) // fds.itemsize * fds.itemsize])
        try:
            if not message:
                self._gone = "it closed the connection (refused, or its engine was closed)"
                return False
            offer = msgspec.msgpack.decode(message, type=Offer)
            if offer.proof != self._proof or len(offer.arenas) != len(fds):
                raise ValueError("not the peer that published this endpoint")
            for address in offer.withdrawn:
                self._retired.append(self._maps.pop(address)[2])
                self._generation += 1
            for (address, length), fd in zip(offer.arenas, fds, strict=True):
                self._map(address, length, fd)
        except (msgspec.DecodeError, OSError, LookupError, ValueError, OverflowError) as error:
            self._gone = f"its offer of shared memory cannot be used ({error})"
            return False
        finally:
            for fd in fds:
                os.close(fd)
        self._index()
        return offer.more

    def _map(self, address: int, length: int, fd: int) -> None:
        if address <= 0 or length <= 0 or address + length >= 1 << 64 or address in self._maps:
            raise ValueError(f"{length} bytes at {address:#x}")
        # Without the seal the peer could shrink the file, and a copy of ours would be a SIGBUS.
        if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise ValueError("the memory file is not sealed against shrinking")
        mapping = mmap.mmap(fd, length)  # ValueError when the file is shorter
        ours = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        self._maps[address] = (length, ours, mapping)

    def generation(self) -> int:
        """Another number once memory was withdrawn: what `locate` said before may be untrue.

        A slice that was copied between two looks at the same number, and then confirmed before
        the second, came from what the peer still offered when the slice began.
        """
        with self._lock:
            return self._generation

    def _index(self) -> None:
        """Arrays for `locate`, sorted by the peer's addresses."""
        known = sorted((theirs, length, ours) for theirs, (length, ours, _) in self._maps.items())
        starts = np.array([theirs for theirs, _, _ in known], np.uint64)
        ends = np.array([theirs + length for theirs, length, _ in known], np.uint64)
        # Wraps below zero where our mapping is lower; adding it wraps back.
        offsets = np.array([(ours - theirs) % (1 << 64) for theirs, _, ours in known], np.uint64)
        self._table = starts, ends, offsets  # swapped as one: looked up without the lock

    def locate(self, addresses: Uint64s, lengths: Uint64s) -> Uint64s:
        """Where the peer's runs are mapped here.

        Raises:
            LaneError: REFUSED when a run lies outside the arenas; PEER_GONE.
        """
        if self._gone:
            raise LaneError(Status.PEER_GONE, f"{self._peer} is gone: {self._gone}")
        located, outside = self._look_up(addresses, lengths)
        if outside.any():
            self.learn()  # the peer told us of an arena before it told anybody of the region
            located, outside = self._look_up(addresses, lengths)
        if outside.any():
            bad = int(np.argmax(outside))
            raise LaneError(
                Status.REFUSED,
                f"{int(lengths[bad])} bytes at {int(addresses[bad]):#x} lie outside the memory "
                f"that the engine of {self._peer} allocated or shared, and only that can be "
                "reached without process_vm_readv; allocate it with TransferEngine.allocate, or "
                "use tcp",
            )
        return located

    def covers(self, regions: Iterable[RegionRecord]) -> bool:
        """True when there is an arena, each region lies in one, and no run can lie in two."""
        records = list(regions)
        addresses = np.array([record.address for record in records], np.uint64)
        lengths = np.array([record.length for record in records], np.uint64)
        starts, ends, _ = self._table
        apart = bool((starts[1:] > ends[:-1]).all())  # what the peer shared may touch
        return bool(self._maps) and apart and not self._look_up(addresses, lengths)[1].any()

    def _look_up(
        self, addresses: Uint64s, lengths: Uint64s
    ) -> tuple[Uint64s, np.ndarray[tuple[int], np.dtype[np.bool_]]]:
        """(addresses in our mappings, which runs lie in none and have no meaning there)."""
        starts, ends, offsets = self._table
        if not starts.size:
            return addresses, np.ones(addresses.size, np.bool_)
        slot = np.searchsorted(starts, addresses, side="right").astype(np.int64) - 1
        slot, below = np.maximum(slot, 0), slot < 0
        end = ends[slot]
        outside = below | (addresses > end) | (lengths > end - addresses)
        return addresses + offsets[slot], outside

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """Keep the mappings for the time of one slice, also when `close` comes meanwhile."""
        with self._lock:
            if self._closed:
                raise LaneError(Status.CANCELLED, f"the link to {self._peer} was closed")
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                self._release_if_done()

    def close(self) -> None:
        """Unmap, once the slices in flight have ended. Idempotent."""
        with self._lock:
            self._closed = True
            self._release_if_done()

    def _release_if_done(self) -> None:
        if self._users:
            return
        for mapping in self._retired:
            mapping.close()
        self._retired.clear()
        if not self._closed:
            return
        self._socket.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        for _, _, mapping in self._maps.values():
            mapping.close()
        self._maps.clear()
