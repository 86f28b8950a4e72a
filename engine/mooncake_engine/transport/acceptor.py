"""Accepts connections until closed: one thread accepts, and one serves each connection."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from mooncake_engine.transport import sockets

if TYPE_CHECKING:
    import logging
    import socket
    from collections.abc import Callable

_JOIN_S = 10.0  # a thread leaves within microseconds of its shutdown; more means a bug


class Shuttable(Protocol):
    """What is made of an accepted socket, and owns it."""

    def shutdown(self) -> None:
        """End whatever a thread waits for on it. Any thread."""

    def close(self) -> None:
        """After the serving thread is done with it. Idempotent."""


S = TypeVar("S", bound=Shuttable)


@dataclass(frozen=True)
class Wording:
    """What a server's threads are named, and what its log says."""

    accepting: str  # name of the accepting thread
    serving: str  # names of the serving ones, before the peer's address
    cannot_accept: str  # of the failure
    closed: str  # of the peer and the reason
    lingers: str  # of the thread's name and the seconds


class Acceptor(Generic[S]):
    """Owns a listener and its connections. A blocked connection harms no other."""

    def __init__(
        self,
        listener: socket.socket,
        stream: Callable[[socket.socket], S],
        serve: Callable[[S, str], None],
        wording: Wording,
        log: logging.Logger,
        *,
        retry_s: float,
        limit: int | None = None,
    ) -> None:
        """Take over `listener` and start to accept, so `serve` may run before this returns.

        Args:
            listener: Where peers connect.
            stream: Makes of an accepted socket what owns it.
            serve: Serves one, given the peer's address, in a thread of its own; when it returns or
                raises, the stream is closed. What it raises is a bug.
            wording: For names and messages.
            log: The server's own, so that its messages are found under its name.
            retry_s: Between attempts while accept fails at once, again and again: descriptors are
                short until connections end and give some back.
            limit: Of connections at a time; more are closed unread. None: no limit.
        """
        self._listener = listener
        self._stream = stream
        self._serve = serve
        self._wording = wording
        self._log = log
        self._retry_s = retry_s
        self._limit = limit
        self._closing = threading.Event()
        self._lock = threading.Lock()  # guards _connections
        self._connections: dict[threading.Thread, S] = {}
        # Daemons: a process whose engine was never closed must still be able to exit.
        self._thread = threading.Thread(target=self._accept, name=wording.accepting, daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """How many connections there are now."""
        with self._lock:
            return len(self._connections)

    def close(self) -> None:
        """Stop accepting, end every connection and wait for their threads. Idempotent."""
        self._closing.set()
        sockets.wake_accept(self._listener)
        deadline = time.monotonic() + _JOIN_S
        self._thread.join(_JOIN_S)
        self._listener.close()
        with self._lock:
            connections = dict(self._connections)
        for stream in connections.values():
            stream.shutdown()
        for thread in connections:
            thread.join(max(deadline - time.monotonic(), 0))
            if thread.is_alive():
                self._log.error(self._wording.lingers, thread.name, _JOIN_S)

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                sock, address = self._listener.accept()
            except OSError as failure:
                if not self._closing.wait(self._retry_s):
                    self._log.warning(self._wording.cannot_accept, failure)
                continue
            self._start(sock, sockets.host_port(*address[:2]))

    def _start(self, sock: socket.socket, peer: str) -> None:
        stream = self._stream(sock)
        thread = threading.Thread(
            target=self._run,
            args=(stream, peer),
            name=f"{self._wording.serving}-{peer}",
            daemon=True,
        )
        with self._lock:
            full = self._limit is not None and len(self._connections) >= self._limit
            if not full:
                self._connections[thread] = stream
        if full:
            self._log.warning(self._wording.closed, peer, "too many wait to be greeted")
            stream.close()
            return
        try:
            sockets.configure(sock)
            thread.start()
        except (OSError, RuntimeError) as failure:  # already reset, or no more threads
            self._log.warning(self._wording.closed, peer, failure)
            with self._lock:
                del self._connections[thread]
            stream.close()

    def _run(self, stream: S, peer: str) -> None:
        try:
            self._serve(stream, peer)
        finally:
            stream.close()
            with self._lock:
                del self._connections[threading.current_thread()]
