"""The limit of TCP: loops in C that scatter and gather over 1, 2 or 4 blocking sockets.

Both ends know the list before the first run, so a run is a request of 64 bytes and the bytes, up to
1024 runs in each sendmsg or recvmsg (MSG_WAITALL); a write is acknowledged by as many. The bytes
are shared out evenly over the streams, one thread at each end of each. It allocates nothing, checks
nothing and carries no list: an engine has all that on top. Python only sets the sockets up.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import socket
import struct
import threading
import weakref
from typing import TYPE_CHECKING

import numpy as np
from typing_extensions import override

from mooncake_connector.bench import base, compiled
from mooncake_connector.bench.base import BackendFailed, Route, Transfer, Variant
from mooncake_connector.bench.limits import (
    PreparedRun,
    PreparedRuns,
    address_of,
    check_bounds,
    iovecs,
    joined,
    split,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    Uint64s = NDArray[np.uint64]

logger = logging.getLogger(__name__)
missing = compiled.missing

MAGIC = 0x4C494D49  # not to be taken for another program's first words
# Each has 64 bytes, as has the word before a write's bytes: the kernel copies what lies askew in a
# stream's pages more slowly (mooncake_engine.transport.tcp.wire has a figure).
HELLO = struct.Struct("<IIQQQ32x")  # magic, write?, rows, spin in ns, bytes of a socket buffer
READY = b"\0" * 64
TIMEOUT_S = 30  # without a byte, at the initiator; an idle target waits
TIMEOUT = struct.pack("@ll", TIMEOUT_S, 0)


def variants(route: Route) -> tuple[Variant, ...]:
    """1, 2 and 4 streams as the kernel makes them, and what helped one of them here.

    Small buffers: the halves of a stream wait for each other more often, and whoever waited is let
    in first where the cores are taken: 2048 x 128 KiB beside ten busy processes on two cores took
    48-89 ms instead of 107-130 (lower quartiles, either way, 2 and 4 streams), at the same CPU
    time. Looking for bytes before waiting for them, as engines do: one small piece on an idle
    machine. The last is no limit but the same loop in an engine's place: Python calls it each time.
    """
    if route is not Route.TCP:
        return ()
    return (
        _variant("1 stream", streams=1),
        _variant("2 streams", streams=2),
        _variant("4 streams", streams=4),
        _variant("2 streams, 256 KiB buffers", streams=2, buffer_kib=256),
        _variant("4 streams, 256 KiB buffers", streams=4, buffer_kib=256),
        _variant("1 stream, spins 50 us", streams=1, spin_us=50),
        _variant("2 streams, 256 KiB buffers", streams=2, buffer_kib=256, called=1),
    )


def _variant(name: str, called: int = 0, **options: int) -> Variant:
    return Variant(
        backend="sockets",
        name=f"{'Python calling ' if called else ''}C sockets, {name}",
        route=Route.TCP,
        options={key: str(value) for key, value in options.items()} | {"called": str(called)},
        is_limit=not called,
    )


class _Stream(ctypes.Structure):
    """`struct stream` of streams.c."""

    _fields_ = (
        ("runs", ctypes.c_void_p),
        ("count", ctypes.c_size_t),
        ("fd", ctypes.c_int32),
        ("write", ctypes.c_int32),
        ("spin_ns", ctypes.c_int64),
    )


class _Half:
    """One end of one connection: its list, and the word that asks and acknowledges."""

    def __init__(
        self, sock: socket.socket, bases: Uint64s, lengths: Uint64s, write: bool, spin_ns: int
    ) -> None:
        bases, lengths = joined(bases, lengths)
        self.sock = sock
        self._word = np.zeros(8, np.uint64)
        self._runs = iovecs(
            np.insert(bases, 0, address_of(self._word)), np.insert(lengths, 0, self._word.nbytes)
        )
        self.part = _Stream(address_of(self._runs), bases.size, sock.fileno(), write, spin_ns)


class Target(base.Target):
    """Accepts; a thread for each connection, in C from its list's arrival to its end."""

    def __init__(self, memory: NDArray[np.uint8], options: Mapping[str, str]) -> None:
        """Listen on the address in `options`, or on this machine's loopback."""
        compiled.library()  # its errors come here and not in a thread
        self._memory = memory
        host = options.get("host", "127.0.0.1")
        self._lock = threading.Lock()  # guards _open and _closed
        self._open: set[socket.socket] = set()
        self._closed = False
        self._threads: list[threading.Thread] = []
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._listener = socket.create_server((host, 0), family=family)
        except OSError as failure:
            raise BackendFailed(f"cannot listen on {host}: {failure}; set host") from failure
        self._start(self._accept)

    @override
    def address(self) -> dict[str, str]:
        host, port = self._listener.getsockname()[:2]
        return {"host": host, "port": str(port), "size": str(self._memory.size)}

    @override
    def close(self) -> None:
        with self._lock:
            self._closed = True
            for sock in (self._listener, *self._open):
                with contextlib.suppress(OSError):  # the other end was faster
                    sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        self._listener.close()

    def _start(self, run: object, *arguments: object) -> None:
        thread = threading.Thread(target=run, args=arguments, daemon=True)  # type: ignore[arg-type]  # a bound method
        self._threads = [each for each in self._threads if each.is_alive() or not each.ident]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return  # closed
            with self._lock:
                if self._closed:
                    sock.close()
                    return
                self._open.add(sock)
            self._start(self._serve, sock)

    def _serve(self, sock: socket.socket) -> None:
        try:
            half = self._greet(sock)
            sock.sendall(READY)
            if code := compiled.library().limits_serve(ctypes.addressof(half.part)):
                logger.warning("an initiator's connection ended: %s", os.strerror(-code))
        except (OSError, EOFError, BackendFailed) as failure:
            if not self._closed:
                logger.warning("an initiator is not served: %s", failure)
        finally:
            with self._lock:
                self._open.discard(sock)
                sock.close()

    def _greet(self, sock: socket.socket) -> _Half:
        magic, write, rows, spin_ns, buffer = HELLO.unpack(_exactly(sock, HELLO.size))
        if magic != MAGIC or rows > self._memory.size:
            raise BackendFailed("another program has our port")
        _configure(sock, buffer)
        tables = _exactly(sock, -(-rows // 4) * 64)[: 16 * rows]
        offsets, lengths = np.frombuffer(tables, np.uint64).reshape(2, rows)
        check_bounds(offsets, lengths, self._memory.size, "target")
        return _Half(
            sock, offsets + np.uint64(address_of(self._memory)), lengths, bool(write), spin_ns
        )


class Initiator(base.Initiator):
    """Opens its streams anew for each prepared run."""

    def __init__(self, memory: NDArray[np.uint8], options: Mapping[str, str]) -> None:
        """Args: options: "streams", "buffer_kib" of a socket, "spin_us" to look first, "called"."""
        self._memory = memory
        self._streams = int(options["streams"])
        self._spin_ns = int(options.get("spin_us", "0")) * 1000
        self._buffer = int(options.get("buffer_kib", "0")) << 10
        self._kind = PreparedRun if options.get("called") == "1" else PreparedRuns
        self._address = ("", 0)
        self._size = 0
        self._spare: socket.socket | None = None
        self._prepared: weakref.WeakSet[PreparedRun] = weakref.WeakSet()

    @override
    def connect(self, address: Mapping[str, str]) -> None:
        self._address = (address["host"], int(address["port"]))
        self._size = int(address["size"])
        self._spare = self._dial()  # the first prepared run's first stream

    @override
    def prepare(self, transfer: Transfer) -> PreparedRun:
        check_bounds(transfer.local, transfer.lengths, self._memory.size, "initiator")
        check_bounds(transfer.remote, transfer.lengths, self._size, "target")
        halves: list[_Half] = []

        def release() -> None:
            for half in halves:
                half.sock.close()

        try:
            halves.extend(map(self._open, split(transfer, self._streams)))
        except BaseException:
            release()
            raise

        def describe(error: OSError) -> str:
            return (
                f"{transfer.op} of {transfer.nbytes} bytes over {len(halves)} stream(s) with "
                f"{self._where} failed: {error}; does the target live? It is given up after "
                f"{TIMEOUT_S} s without a byte"
            )

        run = self._kind("limits_ask", [half.part for half in halves], describe, release)
        self._prepared.add(run)
        return run

    @override
    def close(self) -> None:
        for run in self._prepared:
            run.close()
        if self._spare is not None:
            self._spare.close()

    @property
    def _where(self) -> str:
        return "{}:{}".format(*self._address)

    def _dial(self) -> socket.socket:
        try:
            return socket.create_connection(self._address, TIMEOUT_S)
        except OSError as failure:
            raise BackendFailed(
                f"cannot connect to the target at {self._where}: {failure}; is it running?"
            ) from failure

    def _open(self, part: Transfer) -> _Half:
        write = part.op == "write"
        base_address = np.uint64(address_of(self._memory))
        sock, self._spare = self._spare or self._dial(), None
        try:
            _configure(sock, self._buffer)
            rows = part.lengths.size
            sock.sendall(HELLO.pack(MAGIC, write, rows, self._spin_ns, self._buffer))
            tables = part.remote.tobytes() + part.lengths.tobytes()
            sock.sendall(tables.ljust(-(-len(tables) // 64) * 64, b"\0"))
            _exactly(sock, len(READY))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, TIMEOUT)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, TIMEOUT)
        except (OSError, EOFError) as failure:
            sock.close()
            raise BackendFailed(
                f"the target at {self._where} did not take a list of {part.lengths.size} runs: "
                f"{failure}; its log says why"
            ) from failure
        return _Half(sock, part.local + base_address, part.lengths, write, self._spin_ns)


def _configure(sock: socket.socket, buffer: int) -> None:
    """Blocking, as the C loops want it, and nothing held back. Buffer 0: the kernel's choice."""
    sock.settimeout(None)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF) if buffer else ():
        sock.setsockopt(socket.SOL_SOCKET, option, buffer)


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        if not (count := sock.recv_into(view)):
            raise EOFError("it closed the connection")
        view = view[count:]
    return bytes(data)
