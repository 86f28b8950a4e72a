"""The listening side: accepts lanes, greets them, and ends them all on close."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

from mooncake_engine.transport.acceptor import Acceptor, Wording
from mooncake_engine.transport.tcp import wire
from mooncake_engine.transport.tcp.frames import Ledgers, NativeFrames, PythonFrames
from mooncake_engine.transport.tcp.serving import Serving
from mooncake_engine.transport.tcp.stream import DeadlinePassed, Stream

if TYPE_CHECKING:
    import socket

    from mooncake_engine.config import EngineConfig
    from mooncake_engine.grants import GrantTable
    from mooncake_engine.memory import RegionTable
    from mooncake_engine.native import Library
    from mooncake_engine.transport.tcp.frames import Frames

_log = logging.getLogger(__name__)

# Connections that did not greet yet, beside the served ones: enough for the peers of a large
# deployment to arrive in one second, and few enough that strangers cannot use up the threads.
_GREETING = 64
_RETRY_S = 0.2
_CLOSED = "closed the tcp connection of %s: %s"
_WORDING = Wording(
    accepting="tcp-accept",
    serving="tcp-lane",
    cannot_accept="tcp server cannot accept a lane: %s; it goes on trying",
    closed=_CLOSED,
    lingers="%s is still in a system call %g s after close",
)


class Server:
    """One thread accepts, one thread per lane serves; a blocked lane harms no other."""

    def __init__(
        self,
        listener: socket.socket,
        config: EngineConfig,
        regions: RegionTable,
        grants: GrantTable,
        incarnation: str,
        library: Library | None,
    ) -> None:
        """Take over `listener` and start to accept; `library`: serve with its loop."""
        self._config = config
        self._regions = regions
        self._grants = grants
        self._incarnation = incarnation
        self._ledgers = Ledgers(library, regions, grants) if library else None
        self._lock = threading.Lock()  # guards _served
        self._served: set[Stream] = set()  # those of _lanes that were welcomed
        self._lanes = Acceptor(
            listener,
            Stream,
            self._serve,
            _WORDING,
            _log,
            retry_s=_RETRY_S,
            limit=config.tcp.max_served_lanes + _GREETING,
        )

    def close(self) -> None:
        """Stop accepting, end every lane and wait for their threads. Idempotent."""
        self._lanes.close()

    def _serve(self, stream: Stream, peer: str) -> None:
        try:
            if self._greet(stream, peer):
                stream.set_timeouts(self._config.tcp.send_timeout_s)
                Serving(self._frames_of(stream), self._regions, self._grants).run()
        except wire.Malformed as reason:
            _log.warning(_CLOSED, peer, reason)
        except (DeadlinePassed, BlockingIOError):
            _log.warning(_CLOSED, peer, "it stopped in mid-frame")
        except EOFError:
            _log.debug("tcp lane of %s was ended in mid-frame", peer)
            stream.reset_on_close()
        except OSError as failure:
            _log.debug("tcp lane of %s ended in mid-frame: %r", peer, failure)
        finally:
            with self._lock:
                self._served.discard(stream)

    def _frames_of(self, stream: Stream) -> Frames:
        return NativeFrames(stream, self._ledgers) if self._ledgers else PythonFrames(stream)

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
