"""Metadata without a server: a segment's name is the address that answers for it.

`get("segments/10.0.0.1:15003")` asks that address. All else stays in this process: `put` publishes
to whoever asks, `list` and `watch` see own keys only.

Wire: request `magic, u32 length, key`; answer `magic, u32 length, value`, or length 2**32 - 1 for
"not here". Numbers are big-endian. One question per connection.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING

from typing_extensions import override

from mooncake_engine.errors import MetadataError
from mooncake_engine.metadata.base import MetadataStore, OnChange, Watch
from mooncake_engine.metadata.local import LocalTable

if TYPE_CHECKING:
    from mooncake_engine.config import MetadataConfig

log = logging.getLogger(__name__)

_HEADER = struct.Struct("!4sI")
_MAGIC = b"MCP1"
_NOT_HERE = 2**32 - 1
_MAX_KEY = 4096
_MAX_VALUE = 16 << 20  # a record with 100 000 regions has 3 MB
_MAX_ASKING = 64  # connections served at once; more wait in the listen queue
_ANSWER_S = 5.0  # a stranger who connects and is silent is closed after this


class P2pStore(MetadataStore):
    """Listens on `host` and answers for its own keys."""

    def __init__(self, config: MetadataConfig, host: str) -> None:
        """Start to listen.

        Args:
            config: `p2p_min_port` and `p2p_max_port` bound the port; 0 in both: any.
            host: Address to listen on and the one peers use.

        Raises:
            MetadataError: When the host is not ours or no port of the range is free.
        """
        self._timeout_s = config.timeout_s
        self._table = LocalTable()
        self._watches: list[Watch] = []
        self._closed = threading.Event()
        self._asking = threading.BoundedSemaphore(_MAX_ASKING)
        self._lock = threading.Lock()  # guards _answering
        self._answering: dict[socket.socket, threading.Thread] = {}
        self._listener = _listen(host, config.p2p_min_port, config.p2p_max_port)
        port = self._listener.getsockname()[1]
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._thread = threading.Thread(
            target=self._accept, name=f"p2p-metadata {self.address}", daemon=True
        )
        self._thread.start()

    @override
    def put(self, key: str, value: bytes) -> None:
        """See `MetadataStore.put`."""
        self._check_open()
        if len(value) > _MAX_VALUE:
            raise MetadataError(
                f"the value of {key} has {len(value)} bytes; at most {_MAX_VALUE} can be published"
            )
        self._table.put(key, value, self)

    @override
    def delete(self, key: str) -> None:
        """See `MetadataStore.delete`."""
        self._check_open()
        self._table.delete(key, self)

    @override
    def get(self, key: str) -> bytes | None:
        """Own keys from here; `segments/host:port` from that host. None: it is not there.

        Raises:
            MetadataError: Nobody answers at that address, or the name is no address.
        """
        self._check_open()
        kind, _, name = key.partition("/")
        if kind != "segments" or name == self.address or self._table.get(key) is not None:
            return self._table.get(key)
        host, _, port = name.rpartition(":")
        if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
            raise MetadataError(
                f"without a metadata server a segment is named host:port, got {name!r}; "
                "use the name the peer shows, or metadata backend etcd"
            )
        try:
            return _ask(host.strip("[]"), int(port), key, self._timeout_s)
        except OSError as exc:
            raise MetadataError(
                f"cannot ask {name} for its segment: {exc.strerror or exc}; "
                "check that the peer runs and that this address is reachable from here"
            ) from exc

    @override
    def list(self, prefix: str) -> dict[str, bytes]:
        """Own keys below `prefix`."""
        self._check_open()
        return self._table.list(prefix)

    @override
    def watch(self, prefix: str, on_change: OnChange) -> Watch:
        """Report own keys below `prefix`."""
        self._check_open()
        watch = self._table.watch(prefix, on_change)
        self._watches.append(watch)
        return watch

    @override
    def close(self) -> None:
        """See `MetadataStore.close`."""
        if self._closed.is_set():
            return
        self._closed.set()
        with contextlib.suppress(OSError):  # wakes accept()
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        with self._lock:
            answering = list(self._answering.items())
            for connection, _ in answering:
                with contextlib.suppress(OSError):  # wakes recv()
                    connection.shutdown(socket.SHUT_RDWR)
        for _, thread in answering:
            thread.join()
        for watch in self._watches:
            watch.close()

    def _accept(self) -> None:
        while True:
            self._asking.acquire()
            try:
                connection, peer = self._listener.accept()
            except OSError as exc:
                self._asking.release()
                if self._closed.is_set():
                    return
                log.warning("%s: cannot accept a connection: %s", self.address, exc)
                self._closed.wait(0.1)  # out of descriptors? do not spin until some are free
                continue
            thread = threading.Thread(
                target=self._answer,
                args=(connection, peer),
                name=f"p2p-metadata answers {peer[0]}",
                daemon=True,
            )
            with self._lock:
                self._answering[connection] = thread
            thread.start()

    def _answer(self, connection: socket.socket, peer: tuple[object, ...]) -> None:
        try:
            deadline = time.monotonic() + _ANSWER_S
            key = _receive(connection, _MAX_KEY, deadline)
            value = self._table.get((key or b"").decode(errors="replace"))
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            if value is None:
                connection.sendall(_HEADER.pack(_MAGIC, _NOT_HERE))
            else:
                connection.sendall(_HEADER.pack(_MAGIC, len(value)) + value)
        except OSError as exc:
            if not self._closed.is_set():
                log.warning("%s: closed the connection of %s: %s", self.address, peer[0], exc)
        finally:
            with self._lock:
                del self._answering[connection]
                connection.close()
            self._asking.release()

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise MetadataError("the metadata store is closed")


def _listen(host: str, first: int, last: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    except OSError as exc:
        raise MetadataError(
            f"engine.host {host!r} cannot be resolved: {exc.strerror}; name an address of this host"
        ) from exc
    for port in range(first, last + 1):
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.bind((address[0], port, *address[2:]))
            listener.listen(_MAX_ASKING)
        except OSError as exc:
            listener.close()
            reason = exc
        else:
            return listener
    raise MetadataError(
        f"cannot listen on {host!r}, ports {first} to {last}: {reason.strerror}; set engine.host "
        "to an address of this machine and engine.metadata.p2p_min_port/p2p_max_port to free ports"
    ) from reason


def _ask(host: str, port: int, key: str, timeout: float) -> bytes | None:
    deadline = time.monotonic() + timeout
    with socket.create_connection((host, port), timeout) as connection:
        request = key.encode()
        connection.sendall(_HEADER.pack(_MAGIC, len(request)) + request)
        return _receive(connection, _MAX_VALUE, deadline)


def _receive(connection: socket.socket, limit: int, deadline: float) -> bytes | None:
    magic, length = _HEADER.unpack(_exactly(connection, _HEADER.size, deadline))
    if magic != _MAGIC:
        raise ConnectionError(f"it does not speak our protocol (began with {magic!r})")
    if length == _NOT_HERE:
        return None
    if length > limit:
        raise ConnectionError(f"it announced {length} bytes; at most {limit} are accepted")
    return _exactly(connection, length, deadline)


def _exactly(connection: socket.socket, length: int, deadline: float) -> bytes:
    received = bytearray()
    while len(received) < length:
        # The deadline, not the pause between two bytes, bounds what a slow stranger costs.
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        piece = connection.recv(min(length - len(received), 1 << 16))
        if not piece:
            raise ConnectionError(f"it hung up after {len(received)} of {length} bytes")
        received += piece
    return bytes(received)
