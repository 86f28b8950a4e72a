"""Memory that peers of this machine can map: allocated by the engine, or shared when registered.

A memfd has no name in /dev/shm that a killed process would leave behind. Peers get its
descriptor over an abstract unix socket, which needs no permission to ptrace.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import hashlib
import logging
import mmap
import os
import selectors
import socket
import struct
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from mooncake_engine.errors import EngineError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mooncake_engine.transport.shm.shared_pages import SharedPages

logger = logging.getLogger(__name__)

VERSION = 2
MESSAGE_BYTES = 64 << 10  # bound of one message either way; an offer of FDS_PER_OFFER takes 2 KiB
FDS_PER_OFFER = 64  # the kernel passes at most 253 (SCM_MAX_FD) in one message
MAX_READERS = 1024  # each costs one descriptor
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Hello(msgspec.Struct, frozen=True, array_like=True):
    """First and only message of a reader."""

    version: int
    proof: bytes


class Offer(msgspec.Struct, frozen=True, array_like=True):
    """Arenas of the target, one descriptor each beside the message, in the same order."""

    proof: bytes
    arenas: tuple[tuple[int, int], ...]  # (address in the target, bytes)
    more: bool  # another offer follows at once
    withdrawn: tuple[int, ...] = ()  # addresses offered before that mean nothing any more


def proof(nonce: bytes, side: bytes) -> bytes:
    """Shows that `side` knows the endpoint's nonce without telling it to a stranger."""
    return hashlib.blake2b(nonce, person=side, digest_size=32).digest()


class Arena:
    """One memfd and our mapping of it. The array may outlive `close`; no peer then finds it."""

    def __init__(self, length: int) -> None:
        # One page more than asked for keeps two arenas apart in memory, so that no run can span
        # both: the reader has them at unrelated addresses. The page is never backed.
        usable = -(-length // mmap.PAGESIZE) * mmap.PAGESIZE
        total = usable + mmap.PAGESIZE
        if usable > (free := available_bytes()):  # fallocate would not fail, the OOM killer comes
            raise EngineError(
                f"cannot allocate {length} bytes of shared memory: this machine has {free} to "
                "give; ask for less"
            )
        self.fd = memory_file(total)
        try:
            mapping = mmap.mmap(self.fd, total)
        except BaseException:
            os.close(self.fd)
            raise
        self.array: NDArray[np.uint8] = np.frombuffer(mapping, np.uint8, count=length)
        self.address: int = self.array.__array_interface__["data"][0]
        self.length = length

    def close(self) -> None:
        """Offer it no longer. Once."""
        os.close(self.fd)


class ArenaServer:
    """Allocates arenas and hands their descriptors to readers, also those allocated later.

    An arena lives until `close`. Pages that were shared are withdrawn before their address can
    mean others: a reader that copied from the old ones finds the message when it has done so.
    """

    def __init__(self, name: str, nonce: bytes, hello_timeout_s: float, any_user: bool) -> None:
        """Args: name: abstract socket name; any_user: serve readers of other users too.

        Raises `OSError` when the process has no descriptor left.
        """
        self._nonce = nonce
        self._hello_timeout_s = hello_timeout_s
        self._any_user = any_user
        self._lock = threading.Lock()  # guards the next three and their order: none is missed
        self._arenas: list[Arena | SharedPages] = []
        self._shared: dict[int, SharedPages] = {}  # of them, by their region's address
        self._readers: set[socket.socket] = set()
        self._waiting: dict[socket.socket, float] = {}  # until when to say hello; thread's own
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._closed = False
        try:
            self._listener.bind(b"\0" + name.encode())
            self._listener.listen(64)
            self._listener.setblocking(False)
        except OSError:
            self._listener.close()
            os.close(self._wake)
            raise
        self._thread = threading.Thread(target=self._serve, name="shm-arena", daemon=True)
        self._thread.start()

    def allocate(self, length: int) -> NDArray[np.uint8]:
        """`length` > 0 zeroed bytes at a page boundary; each reader has been told on return.

        Raises `OSError` at a limit of the process, `EngineError` when memory is short.
        """
        arena = Arena(length)
        with self._lock:
            self._add(arena)
        return arena.array

    def has(self, address: int) -> bool:
        """Does it lie in memory that this server offers?"""
        with self._lock:
            return any(0 <= address - each.address < each.length for each in self._arenas)

    def share(self, address: int, pages: SharedPages) -> None:
        """Offer the pages of the region at `address`; each reader has been told on return."""
        with self._lock:
            self._shared[address] = pages
            self._add(pages)

    def withdraw(self, address: int) -> None:
        """Give the process the region's pages back, if they were shared."""
        with self._lock:
            pages = self._shared.pop(address, None)
            if pages is None:
                return
            self._arenas.remove(pages)
            said = Offer(proof(self._nonce, b"target"), (), more=False, withdrawn=(pages.address,))
            for reader in self._readers:
                self._send(reader, said, [])
        pages.close()

    def _add(self, arena: Arena | SharedPages) -> None:
        self._arenas.append(arena)
        for reader in self._readers:
            self._offer(reader, [arena])

    def close(self) -> None:
        """Let the readers go (they see PEER_GONE) and give back the descriptors. Idempotent."""
        if self._closed:
            return
        self._closed = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()  # it never blocks but in select, which the eventfd ends
        os.close(self._wake)
        for arena in self._arenas:
            arena.close()
        self._arenas.clear()

    def _offer(self, reader: socket.socket, arenas: list[Arena | SharedPages]) -> None:
        for start in range(0, max(len(arenas), 1), FDS_PER_OFFER):
            part = arenas[start : start + FDS_PER_OFFER]
            offer = Offer(
                proof(self._nonce, b"target"),
                tuple((arena.address, arena.length) for arena in part),
                more=start + FDS_PER_OFFER < len(arenas),
            )
            if not self._send(reader, offer, [arena.fd for arena in part]):
                return

    def _send(self, reader: socket.socket, offer: Offer, fds: list[int]) -> bool:
        """Send without waiting. A reader that does not take its messages loses its connection."""
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
        try:
            # Not socket.send_fds, which drops its flags (CPython 3.11 to 3.13).
            reader.sendmsg(
                [msgspec.msgpack.encode(offer)],
                [rights] if fds else [],
                socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL,
            )
        except OSError as error:
            # As text: a kept log record would keep the frame, and that the arena.
            logger.warning("a reader of shared memory is dropped: %s", str(error))
            with contextlib.suppress(OSError):  # it may be gone already
                reader.shutdown(socket.SHUT_RDWR)  # the thread sees it and closes it
            return False
        return True

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._wake, selectors.EVENT_READ)
            while not self._closed:
                limit = min(self._waiting.values(), default=None)
                wait = None if limit is None else max(0.0, limit - time.monotonic())
                for key, _ in selector.select(wait):
                    if key.fileobj is self._listener:
                        self._accept(selector)
                    elif isinstance(key.fileobj, socket.socket):
                        self._hear(selector, key.fileobj)
                now = time.monotonic()
                for late in [sock for sock, until in self._waiting.items() if until <= now]:
                    self._drop(selector, late, "it did not say hello in time")
        self._listener.close()
        with self._lock:
            for sock in (*self._waiting, *self._readers):
                # Also a copy in a forked child must not keep the reader believing.
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
                sock.close()
            self._waiting.clear()
            self._readers.clear()

    def _accept(self, selector: selectors.BaseSelector) -> None:
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:  # no descriptor left: the listener would stay readable
            logger.warning("cannot accept a reader of shared memory: %s", error)
            with selectors.DefaultSelector() as closing:
                closing.register(self._wake, selectors.EVENT_READ)
                closing.select(1.0)  # try again in a second unless closed before
            return
        sock.setblocking(False)
        if len(self._waiting) + len(self._readers) >= MAX_READERS:
            logger.warning("a reader of shared memory is refused: %d are connected", MAX_READERS)
            sock.close()
            return
        self._waiting[sock] = time.monotonic() + self._hello_timeout_s
        selector.register(sock, selectors.EVENT_READ)

    def _hear(self, selector: selectors.BaseSelector, sock: socket.socket) -> None:
        """A reader says hello once; anything later is its end."""
        if sock not in self._waiting:
            self._drop(selector, sock, "")
            return
        try:
            fault = self._fault(sock, sock.recv(MESSAGE_BYTES))
        except OSError as error:
            fault = str(error)
        if fault:
            self._drop(selector, sock, fault)
            return
        del self._waiting[sock]
        with self._lock:
            self._readers.add(sock)
            self._offer(sock, self._arenas)

    def _fault(self, sock: socket.socket, message: bytes) -> str:
        """Why this hello is not served; empty when it is."""
        try:
            hello = msgspec.msgpack.decode(message, type=Hello)
        except msgspec.DecodeError as error:
            return f"its hello cannot be read ({error})"
        if hello.version != VERSION or hello.proof != proof(self._nonce, b"reader"):
            return "it does not know this engine's nonce, or speaks another version"
        _, uid, _ = peer_credentials(sock)
        if uid != os.geteuid() and not self._any_user:
            return f"it runs as user {uid} and shm.allow_any_reader is off"
        return ""

    def _drop(self, selector: selectors.BaseSelector, sock: socket.socket, why: str) -> None:
        if why:
            logger.warning("a reader of shared memory is refused: %s", why)
        selector.unregister(sock)
        self._waiting.pop(sock, None)
        with self._lock:
            self._readers.discard(sock)
        sock.close()


def memory_file(length: int) -> int:
    """A memfd of so many bytes, sealed so that a reader can trust its size."""
    fd = os.memfd_create("mooncake-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, length)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def available_bytes() -> int:
    """Memory that this machine can give without swapping, as the kernel estimates it."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise EngineError("/proc/meminfo names no MemAvailable; a kernel since 3.14 does")


def peer_credentials(sock: socket.socket) -> tuple[int, int, int]:
    """(pid, uid, gid) of the process at the other end, as this one's namespaces number them."""
    size = struct.calcsize("3i")
    return struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
