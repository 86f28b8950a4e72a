"""The target's side: a thread per control connection, and the queue pairs made over it."""

from __future__ import annotations

import contextlib
import logging
import secrets
from typing import TYPE_CHECKING

from typing_extensions import override

from mooncake_engine.errors import LaneError
from mooncake_engine.transport.acceptor import Acceptor, Wording
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

_RETRY_S = 0.05
_CLOSED = "closed the RDMA control connection of %s: %s"
_WORDING = Wording(
    accepting="rdma-accept",
    serving="rdma-peer",
    cannot_accept="cannot accept an RDMA control connection: %s",
    closed=_CLOSED,
    lingers="%s did not end %g s after close",
)


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
        self._contexts = contexts
        self._keys = keys
        self._settle = settle
        self._incarnation = incarnation
        self._timeout_s = timeout_s
        self._connections = Acceptor(
            listener, MessageStream, self._serve, _WORDING, _log, retry_s=_RETRY_S
        )

    def close(self) -> None:
        """End every connection and its queue pairs, and wait for the threads. Idempotent."""
        self._connections.close()

    def _serve(self, stream: MessageStream, peer: str) -> None:
        try:
            with contextlib.closing(
                _Endpoints(stream, self._contexts, self._keys, self._settle)
            ) as endpoints:
                if self._greet(stream):
                    stream.set_patience(None)
                    endpoints.run()
        except Malformed as reason:
            _log.warning(_CLOSED, peer, reason)
        except VerbsError as error:
            _log.error(_CLOSED, peer, error.strerror)
        except (OSError, EOFError) as failure:
            _log.debug("the RDMA control connection of %s ended: %r", peer, failure)
        except Exception:  # noqa: BLE001 - what one peer sends must not end in silence
            _log.exception("serving the RDMA control connection of %s failed", peer)

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
