"""The initiator's end of a control connection: who is there, its keys, its answers, its end."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import threading
from typing import TYPE_CHECKING

from mooncake_engine.errors import PathUnavailable
from mooncake_engine.transport import sockets
from mooncake_engine.transport.rdma.keys import KeyTable
from mooncake_engine.transport.rdma.messages import (
    Accepted,
    Hello,
    Keys,
    Malformed,
    MessageStream,
    Proven,
    Refused,
    Settle,
    Settled,
    WantKeys,
    Welcome,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from mooncake_engine.transport.rdma.job import Job
    from mooncake_engine.transport.rdma.messages import Message
    from mooncake_engine.transport.rdma.records import RdmaEndpoint

_log = logging.getLogger(__name__)


class Question:
    """Asked of the peer; `answer` is None until it answers, and then empty if all is well."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.answer: str | None = None


class Control:
    """A connection and the thread that reads it. Safe to call from any thread."""

    def __init__(
        self,
        name: str,
        incarnation: str,
        peer: RdmaEndpoint,
        timeout_s: float,
        *,
        on_answer: Callable[[Accepted | Refused | Proven], None],
        on_gone: Callable[[str], None],
    ) -> None:
        """Connect, greet and learn the peer's keys.

        Args:
            name: The peer, for messages.
            incarnation: The one that must be there.
            peer: Where.
            timeout_s: For connecting, and for each of its first answers.
            on_answer: Told, by the reading thread, what concerns endpoints.
            on_gone: Told why, once, when the connection ends.

        Raises:
            PathUnavailable: Nobody there, or somebody else.
        """
        self.name = name
        self._devices = len(peer.devices)
        self._on_answer = on_answer
        self._on_gone = on_gone
        self._lock = threading.Lock()  # guards all below
        self._gone = ""
        self._keys: tuple[KeyTable, tuple[str, ...]]
        self._keys_wanted: dict[Job, int] = {}  # and which answer it waits for
        self._keys_told = 0
        self._asking = threading.Lock()  # so that questions are counted in their order
        self._keys_asked = 0
        self._tokens = itertools.count(1)
        self._questions: dict[int, Question] = {}
        try:
            self._stream = MessageStream(sockets.dial(peer.host, peer.port, timeout_s))
        except (OSError, ValueError) as failure:
            raise PathUnavailable(f"cannot connect to {name}: {failure}") from failure
        try:
            self._greet(incarnation, timeout_s)
        except (OSError, EOFError, Malformed) as failure:
            self._stream.close()
            raise PathUnavailable(f"no greeting from {name}: {failure}") from failure
        except BaseException:
            self._stream.close()
            raise
        self._reader = threading.Thread(target=self._read, name=f"rdma-control-{name}", daemon=True)

    def _greet(self, incarnation: str, timeout_s: float) -> None:
        stream = self._stream
        stream.set_patience(timeout_s)
        stream.send(Hello(incarnation))
        welcome = stream.receive()
        if not isinstance(welcome, Welcome):
            raise Malformed("it did not greet")
        if welcome.refusal:
            raise PathUnavailable(f"{self.name} refuses: {welcome.refusal}")
        stream.send(WantKeys())
        keys = stream.receive()
        if not isinstance(keys, Keys):
            raise Malformed("it did not tell its keys")
        self._take_keys(keys)
        stream.set_patience(None)

    def start(self) -> None:
        """Begin to read; callbacks come from now on."""
        self._reader.start()

    @property
    def gone(self) -> str:
        """Why the peer is gone; empty while it is there."""
        return self._gone

    @property
    def keys(self) -> tuple[KeyTable, tuple[str, ...]]:
        """The peer's keys and the location of each row, as last told."""
        return self._keys

    @property
    def keys_told(self) -> int:
        """How many questions for keys were answered."""
        return self._keys_told

    def send(self, message: Message) -> None:
        """Say something; that the peer is gone is told by `on_gone`."""
        try:
            self._stream.send(message)
        except OSError as failure:
            self._lost(f"{self.name} is gone: its control connection broke ({failure})")

    def ask_for_keys(self, job: Job) -> int:
        """Ask for the keys again; `job` is woken when they are there, or never will be.

        Returns:
            They are the answer to this question when `keys_told` has come to so many. Those before
            may be as old as the questions of others.
        """
        with self._asking:
            self._keys_asked += 1
            with self._lock:
                self._keys_wanted[job] = question = self._keys_asked
            self.send(WantKeys())
        return question

    def settle(self, gpus: tuple[int, ...], job: Job) -> Question:
        """Ask the peer to let its GPUs see what was written; `job` is woken as above."""
        question = Question(job)
        token = next(self._tokens)
        with self._lock:
            self._questions[token] = question
        self.send(Settle(token, gpus))
        return question

    def close(self) -> None:
        """End the connection and the thread. Idempotent."""
        self._stream.shutdown()
        if self._reader.ident is not None:
            self._reader.join()
        self._stream.close()

    def _read(self) -> None:
        try:
            while True:
                self._take(self._stream.receive())
        except EOFError:
            self._lost(f"{self.name} is gone: it closed its control connection")
        except (OSError, Malformed) as failure:
            self._lost(f"{self.name} is gone: its control connection ended ({failure})")
        except Exception as bug:  # noqa: BLE001 - else the peer would be waited for in silence
            _log.exception("reading what %s says failed", self.name)
            self._lost(f"reading what {self.name} says failed: {bug!r}")

    def _take(self, message: Message) -> None:
        match message:
            case Accepted() | Refused() | Proven():
                self._on_answer(message)
            case Settled(token=token, error=error):
                with self._lock:
                    question = self._questions.pop(token, None)
                if question is not None:
                    question.answer = error
                    question.job.wake()
            case Keys():
                self._take_keys(message)
                self._keys_told += 1
                self._wake(self._keys_told)
            case other:
                raise Malformed(f"it sent a {type(other).__name__}, which initiators do not take")

    def _take_keys(self, keys: Keys) -> None:
        try:
            table = KeyTable(keys.rows, self._devices)
        except ValueError as bad:
            raise Malformed(f"its keys cannot be used: {bad}") from bad
        if len(keys.locations) != len(keys.rows):
            raise Malformed(f"{len(keys.locations)} locations for {len(keys.rows)} keys")
        by_address = dict(zip((row.address for row in keys.rows), keys.locations, strict=True))
        self._keys = table, tuple(by_address[start] for start in table.starts.tolist())

    def _wake(self, told: float) -> None:
        """Wake who waits for one of the first `told` answers."""
        with self._lock:
            wanted = [job for job, question in self._keys_wanted.items() if question <= told]
            for job in wanted:
                del self._keys_wanted[job]
        for job in wanted:
            job.wake()

    def _lost(self, reason: str) -> None:
        with self._lock:
            if self._gone:
                return
            self._gone = reason
            questions, self._questions = self._questions, {}
        with contextlib.suppress(OSError):
            self._stream.shutdown()
        self._on_gone(reason)
        self._wake(math.inf)
        for question in questions.values():
            question.job.wake()
