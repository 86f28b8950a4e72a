"""The listening side: accepts lanes, greets them, and ends them all on close."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

from mooncake_engine.transport import sockets
from mooncake_engine.transport.tcp import wire
from mooncake_engine.transport.tcp.serving import Serving
from mooncake_engine.transport.tcp.stream import DeadlinePassed, Stream

if TYPE_CHECKING:
    import socket

    from mooncake_engine.config import EngineConfig
    from mooncake_engine.grants import GrantTable
    from mooncake_engine.memory import RegionTable

_log = logging.getLogger(__name__)

# Connections that did not greet yet, beside the served ones: enough for the peers of a large
# deployment to arrive in one second, and few enough that strangers cannot use up the threads.
_GREETING = 64
_RETRY_S = 0.2  # accept fails at once, again and again, while descriptors are short
_JOIN_S = 10.0  # a thread leaves within microseconds of its shutdown; more means a bug


class Server:
    """One thread accepts, one thread per lane serves; a blocked lane harms no other."""

    def __init__(
        self,
        listener: socket.socket,
        config: EngineConfig,
        regions: RegionTable,
        grants: GrantTable,
        incarnation: str,
    ) -> None:
        """Take over `listener` and start to accept."""
        self._listener = listener
        self._config = config
        self._regions = regions
        self._grants = grants
        self._incarnation = incarnation
        self._closing = threading.Event()
        self._lock = threading.Lock()  # guards _lanes and _served
        self._lanes: dict[threading.Thread, Stream] = {}
        self._served: set[Stream] = set()  # those of _lanes that were welcomed
        # Daemons: a process whose engine was never closed must still be able to exit.
        self._acceptor = threading.Thread(target=self._accept, name="tcp-accept", daemon=True)
        self._acceptor.start()

    def close(self) -> None:
        """Stop accepting, end every lane and wait for their threads. Idempotent."""
        self._closing.set()
        sockets.wake_accept(self._listener)
        deadline = time.monotonic() + _JOIN_S
        self._acceptor.join(_JOIN_S)
        self._listener.close()
        with self._lock:
            lanes = dict(self._lanes)
        for stream in lanes.values():
            stream.shutdown()
        for thread in lanes:
            thread.join(max(deadline - time.monotonic(), 0))
            if thread.is_alive():
                _log.error("%s is still in a system call %g s after close", thread.name, _JOIN_S)

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                sock, address = self._listener.accept()
            except OSError as failure:
                if not self._closing.wait(_RETRY_S):
                    _log.warning("tcp server cannot accept a lane: %s; it goes on trying", failure)
                continue
            self._start(sock, sockets.host_port(*address[:2]))

    def _start(self, sock: socket.socket, peer: str) -> None:
        stream = Stream(sock)
        thread = threading.Thread(
            target=self._run, args=(stream, peer), name=f"tcp-lane-{peer}", daemon=True
        )
        with self._lock:
            full = len(self._lanes) >= self._config.tcp.max_served_lanes + _GREETING
            if not full:
                self._lanes[thread] = stream
        if full:
            _log.warning("closed the tcp connection of %s: too many wait to be greeted", peer)
            stream.close()
            return
        try:
            sockets.configure(sock)
            thread.start()
        except (OSError, RuntimeError) as failure:  # already reset, or no more threads
            _log.warning("closed the tcp connection of %s: %s", peer, failure)
            with self._lock:
                del self._lanes[thread]
            stream.close()

    def _run(self, stream: Stream, peer: str) -> None:
        try:
            if self._greet(stream, peer):
                stream.set_timeouts(self._config.tcp.send_timeout_s)
                Serving(stream, self._regions, self._grants).run()
        except wire.Malformed as reason:
            _log.warning("closed the tcp connection of %s: %s", peer, reason)
        except (DeadlinePassed, BlockingIOError):
            _log.warning("closed the tcp connection of %s: it stopped in mid-frame", peer)
        except (OSError, EOFError) as failure:
            _log.debug("tcp lane of %s ended in mid-frame: %r", peer, failure)
        finally:
            stream.close()
            with self._lock:
                self._served.discard(stream)
                del self._lanes[threading.current_thread()]

    def _greet(self, stream: Stream, peer: str) -> bool:
        """Handshake; True when the lane may be served."""
        deadline = time.monotonic() + self._config.connect_timeout_s
        magic = stream.receive_bytes(len(wire.MAGIC), deadline)
        wire.check_magic(magic)  # a stranger is found out by its first bytes
        rest = stream.receive_bytes(wire.HELLO.size - len(wire.MAGIC), deadline)
        verdict = self._judge(stream, *wire.unpack_hello(magic + rest))
        if verdict is not wire.Verdict.WELCOME:
            _log.info("refused a tcp lane of %s: %s", peer, verdict.name)
        stream.send_bytes(wire.pack_welcome(verdict, self._incarnation), deadline)
        return verdict is wire.Verdict.WELCOME

    def _judge(self, stream: Stream, version: int, wanted: str) -> wire.Verdict:
        if version != wire.VERSION:
            return wire.Verdict.OTHER_VERSION
        if wanted != self._incarnation:
            return wire.Verdict.OTHER_INCARNATION
        with self._lock:
            if len(self._served) >= self._config.tcp.max_served_lanes:
                return wire.Verdict.LANES_FULL
            self._served.add(stream)
        return wire.Verdict.WELCOME
