"""The target's side: a thread per control connection, and the queue pairs made over it."""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from typing import TYPE_CHECKING

from typing_extensions import override

from mooncake_engine.errors import LaneError
from mooncake_engine.transport import sockets
from mooncake_engine.transport.rdma import gids, messages
from mooncake_engine.transport.rdma.completions import Owner
from mooncake_engine.transport.rdma.messages import (
    Accepted,
    Connect,
    Disconnect,
    Hello,
    Malformed,
    MessageStream,
    Proven,
    QueueAddress,
    Refused,
    Settle,
    Settled,
    WantKeys,
    Welcome,
)
from mooncake_engine.transport.rdma.verbs.base import VerbsError

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping

    from mooncake_engine.transport.rdma.context import Context
    from mooncake_engine.transport.rdma.messages import Keys
    from mooncake_engine.transport.rdma.verbs.base import QueuePair

_log = logging.getLogger(__name__)

_JOIN_S = 10.0
_RETRY_S = 0.05  # out of descriptors: connections end and give some back


class _Answering(Owner):
    """A target's queue pair: its one receive completes when the probe arrives."""

    def __init__(
        self, queue_pair: QueuePair, context: Context, arrived: Callable[[], object]
    ) -> None:
        """Take over a queue pair.

        Raises:
            VerbsError: So many are awaited that one more could overflow the completion queue.
        """
        self.queue_pair = queue_pair
        self._context = context
        self._arrived = arrived
        try:
            with context.receives.lock:
                context.receives.reserve()
        except VerbsError:
            queue_pair.close()
            raise
        self._awaited = True  # guarded by the lock of `receives`
        context.receives.add(queue_pair.number, self)

    @override
    def completed(self, wr_id: int, status: int, imm: int | None) -> int:
        if not status:  # else it was flushed, since its connection ended
            self._context.later(self._arrived)
        ended, self._awaited = int(self._awaited), False
        return ended

    def close(self) -> None:
        """Destroy it; afterwards its NIC touches no memory for it. Idempotent."""
        receives = self._context.receives
        self.queue_pair.close()
        receives.remove(self.queue_pair.number, self)
        with receives.lock:
            ended, self._awaited = int(self._awaited), False
            receives.give_back(ended)


class Server:
    """Answers control connections until closed."""

    def __init__(
        self,
        listener: socket.socket,
        contexts: Mapping[str, Context],
        keys: Callable[[], Keys],
        settle: Callable[[int], None],
        incarnation: str,
        timeout_s: float,
    ) -> None:
        """Take over a listening socket.

        Args:
            listener: Where initiators connect.
            contexts: Our NICs by name.
            keys: What is registered now.
            settle: Makes what NICs wrote visible to a GPU, or raises `LaneError`.
            incarnation: Ours.
            timeout_s: For a greeting.
        """
        self._listener = listener
        self._contexts = contexts
        self._keys = keys
        self._settle = settle
        self._incarnation = incarnation
        self._timeout_s = timeout_s
        self._closing = threading.Event()
        self._lock = threading.Lock()  # guards _connections
        self._connections: dict[threading.Thread, MessageStream] = {}
        self._acceptor = threading.Thread(target=self._accept, name="rdma-accept", daemon=True)
        self._acceptor.start()

    def close(self) -> None:
        """End every connection and its queue pairs, and wait for the threads. Idempotent."""
        self._closing.set()
        sockets.wake_accept(self._listener)
        deadline = time.monotonic() + _JOIN_S
        self._acceptor.join(_JOIN_S)
        self._listener.close()
        with self._lock:
            connections = dict(self._connections)
        for stream in connections.values():
            stream.shutdown()
        for thread in connections:
            thread.join(max(deadline - time.monotonic(), 0))
            if thread.is_alive():
                _log.error("%s did not end %g s after close", thread.name, _JOIN_S)

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                sock, address = self._listener.accept()
            except OSError as failure:
                if not self._closing.wait(_RETRY_S):
                    _log.warning("cannot accept an RDMA control connection: %s", failure)
                continue
            peer = sockets.host_port(*address[:2])
            stream = MessageStream(sock)
            thread = threading.Thread(
                target=self._run, args=(stream, peer), name=f"rdma-peer-{peer}", daemon=True
            )
            with self._lock:
                self._connections[thread] = stream
            try:
                sockets.configure(sock)
                thread.start()
            except (OSError, RuntimeError) as failure:  # already reset, or no more threads
                _log.warning("closed the RDMA control connection of %s: %s", peer, failure)
                with self._lock:
                    del self._connections[thread]
                stream.close()

    def _run(self, stream: MessageStream, peer: str) -> None:
        try:
            with (
                contextlib.closing(stream),
                contextlib.closing(
                    _Endpoints(stream, self._contexts, self._keys, self._settle)
                ) as endpoints,
            ):
                if self._greet(stream):
                    stream.set_patience(None)
                    endpoints.run()
        except Malformed as reason:
            _log.warning("closed the RDMA control connection of %s: %s", peer, reason)
        except VerbsError as error:
            _log.error("closed the RDMA control connection of %s: %s", peer, error.strerror)
        except (OSError, EOFError) as failure:
            _log.debug("the RDMA control connection of %s ended: %r", peer, failure)
        except Exception:  # noqa: BLE001 - what one peer sends must not end in silence
            _log.exception("serving the RDMA control connection of %s failed", peer)
        finally:
            with self._lock:
                del self._connections[threading.current_thread()]

    def _greet(self, stream: MessageStream) -> bool:
        stream.set_patience(self._timeout_s)
        hello = stream.receive()
        if not isinstance(hello, Hello) or hello.magic != messages.MAGIC:
            raise Malformed("it did not greet")
        refusal = ""
        if hello.version != messages.VERSION:
            refusal = f"it speaks version {messages.VERSION}, not {hello.version}"
        elif hello.incarnation != self._incarnation:
            refusal = (
                f"it is incarnation {self._incarnation} now, not {hello.incarnation}: the engine "
                "restarted and its old addresses are void; look its segment up again"
            )
        stream.send(Welcome(self._incarnation, refusal))
        return not refusal


class _Endpoints:
    """The queue pairs that one initiator asked for. One thread runs it."""

    def __init__(
        self,
        stream: MessageStream,
        contexts: Mapping[str, Context],
        keys: Callable[[], Keys],
        settle: Callable[[int], None],
    ) -> None:
        self._stream = stream
        self._contexts = contexts
        self._keys = keys
        self._settle = settle
        self._by_token: dict[int, list[_Answering]] = {}

    def run(self) -> None:
        """Answer until the connection ends."""
        while True:
            match self._stream.receive():
                case Connect() as wanted:
                    self._connect(wanted)
                case Disconnect(token=token):
                    self._drop(token)
                case WantKeys():
                    self._stream.send(self._keys())
                case Settle() as wanted:
                    self._stream.send(self._settled(wanted))
                case other:
                    raise Malformed(f"it sent a {type(other).__name__}, which targets do not take")

    def _settled(self, wanted: Settle) -> Settled:
        try:
            for gpu in wanted.gpus:
                self._settle(gpu)
        except LaneError as error:
            return Settled(wanted.token, str(error))
        return Settled(wanted.token)

    def _connect(self, wanted: Connect) -> None:
        context = self._contexts.get(wanted.target)
        if context is None:
            reason = f"there is no NIC {wanted.target} here; there are {', '.join(self._contexts)}"
        else:
            reason = gids.mismatch(wanted.nic, context.record)
        if context is None or reason:
            self._stream.send(Refused(wanted.token, reason))
            return
        queues = self._by_token.setdefault(wanted.token, [])
        try:
            addresses, mtu = self._make(context, wanted, queues)
        except VerbsError as error:
            self._drop(wanted.token)
            self._stream.send(Refused(wanted.token, f"{error.strerror}"))
            return
        self._stream.send(Accepted(wanted.token, addresses, mtu, context.record.max_dest_rd_atomic))

    def _make(
        self, context: Context, wanted: Connect, queues: list[_Answering]
    ) -> tuple[tuple[QueueAddress, ...], int]:
        mtu = min(context.mtu, wanted.mtu)
        addresses = []
        for index, initiator in enumerate(wanted.queues):
            queue_pair, _ = context.queue_pair()
            proven = Proven(wanted.token, index)
            queues.append(_Answering(queue_pair, context, lambda proven=proven: self._say(proven)))  # type: ignore[misc]  # binds now
            context.to_init(queue_pair)
            queue_pair.post_receive(index)
            psn = secrets.randbits(24)
            context.connect(queue_pair, wanted.nic, initiator, psn, mtu=mtu, reads=wanted.reads)
            addresses.append(QueueAddress(queue_pair.number, psn))
        return tuple(addresses), mtu

    def _say(self, proven: Proven) -> None:
        with contextlib.suppress(OSError):  # the connection ended; its thread knows
            self._stream.send(proven)

    def _drop(self, token: int) -> None:
        with contextlib.ExitStack() as closing:  # each of them, also when one fails
            for queue in self._by_token.pop(token, ()):
                closing.callback(queue.close)

    def close(self) -> None:
        """Destroy all that is left."""
        with contextlib.ExitStack() as closing:
            for token in self._by_token:
                closing.callback(self._drop, token)
