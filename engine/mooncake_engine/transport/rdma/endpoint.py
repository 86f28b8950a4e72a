"""The queue pairs between one of our NICs and one of a peer's, as their initiator sees them.

Made by messages over the control connection, never waited for by a thread of its own: a lane that
needs an endpoint starts it and is woken when its state changes.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import secrets
import threading
from typing import TYPE_CHECKING, NamedTuple

from mooncake_engine.transport.rdma.messages import Connect, QueueAddress
from mooncake_engine.transport.rdma.send_queue import FLUSHED, SendQueue
from mooncake_engine.transport.rdma.verbs.base import Opcode, VerbsError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from mooncake_engine.transport.rdma.context import Context
    from mooncake_engine.transport.rdma.job import Job
    from mooncake_engine.transport.rdma.messages import Accepted
    from mooncake_engine.transport.rdma.rails import Rail
    from mooncake_engine.transport.rdma.records import DeviceRecord
    from mooncake_engine.transport.rdma.verbs.base import Work


class State(enum.Enum):
    """An endpoint's life."""

    CONNECTING = "connecting"  # the peer was asked for its queue pairs
    PROVING = "proving"  # connected; whether bytes arrive is not known yet
    READY = "ready"
    FAILED = "failed"  # its requests complete as flushed
    CLOSED = "closed"  # its queue pairs are gone


#: State -> what may follow.
FOLLOWS = {
    State.CONNECTING: {State.PROVING, State.FAILED},
    State.PROVING: {State.READY, State.FAILED},
    State.READY: {State.FAILED},
    State.FAILED: {State.CLOSED},
    State.CLOSED: set[State](),
}


class Failure(NamedTuple):
    """Why an endpoint failed."""

    reason: str
    rail: bool  # the path is at fault, so that another rail may do better


class Endpoint:
    """Queue pairs of one rail. Safe to call from any thread."""

    def __init__(
        self,
        context: Context,
        rail: Rail,
        peer: DeviceRecord,
        *,
        deadline: float,
        on_state: Callable[[Endpoint, State], None],
    ) -> None:
        """Make the queue pairs.

        Args:
            context: Our NIC.
            rail: Which of our NICs and which of the peer's.
            peer: The peer's NIC.
            deadline: Monotonic second by which it has to be ready.
            on_state: Told READY and FAILED, once each, by the thread that finds out.

        Raises:
            VerbsError: No more queue pairs, or no place to complete into.
        """
        self.rail = rail
        self.deadline = deadline
        self.token = secrets.randbits(32)
        self.failure: Failure | None = None
        self._context = context
        self._peer = peer
        self._on_state = on_state
        self._lock = threading.Lock()  # guards all below
        self._state = State.CONNECTING
        self._waiting: set[Job] = set()
        self._unproven = set(range(context.config.num_qp))
        self._turn = 0
        self._psns = [secrets.randbits(24) for _ in self._unproven]
        self.queues: list[SendQueue] = []
        try:
            for _ in self._psns:
                queue_pair, completions = context.queue_pair()
                self.queues.append(SendQueue(queue_pair, completions, self))
                context.to_init(queue_pair)
        except BaseException:
            self._close_queues()
            raise

    @property
    def name(self) -> str:
        """For messages: `mlx5_0 -> mlx5_1`."""
        return f"{self._context.record.name} -> {self._peer.name}"

    @property
    def state(self) -> State:
        """As of now."""
        return self._state

    @property
    def pinned(self) -> bool:
        """Something is under way, or it is being made: it must not be evicted."""
        return self._state in {State.CONNECTING, State.PROVING} or not self.idle

    @property
    def idle(self) -> bool:
        """None of its requests is under way."""
        return all(queue.idle for queue in self.queues)

    def silence(self, now: float) -> float:
        """The longest time for which one of its queue pairs owes a completion."""
        return max((queue.silence(now) for queue in self.queues), default=0.0)

    @property
    def broken(self) -> int:
        """Status of the first request that failed by itself; 0: none did."""
        statuses = (queue.broken for queue in self.queues)
        return next((status for status in statuses if status not in {0, FLUSHED}), 0)

    def request(self) -> Connect:
        """What to ask the peer for."""
        return Connect(
            token=self.token,
            nic=self._context.record,
            target=self._peer.name,
            queues=tuple(
                QueueAddress(queue.queue_pair.number, psn)
                for queue, psn in zip(self.queues, self._psns, strict=True)
            ),
            mtu=self._context.mtu,
            reads=self._context.reads,
        )

    def accepted(self, answer: Accepted) -> None:
        """Connect to the peer's queue pairs and prove each of them."""
        with self._lock:
            if not self._follow(State.PROVING):
                return
        try:
            if len(answer.queues) != len(self.queues):
                raise VerbsError(0, f"{len(answer.queues)} queue pairs for {len(self.queues)}")
            for queue, address, psn in zip(self.queues, answer.queues, self._psns, strict=True):
                queue.connect(
                    functools.partial(
                        self._context.connect,
                        peer=self._peer,
                        address=address,
                        psn=psn,
                        mtu=answer.mtu,
                        reads=answer.reads,
                    )
                )
            for index, queue in enumerate(self.queues):
                queue.probe(index)
            for queue in self.queues:
                queue.completions.arm()  # nobody may be polling, and a probe can fail
        except VerbsError as error:
            self.fail(Failure(f"connecting {self.name}: {error.strerror}", rail=True))

    def proven(self, queue: int) -> None:
        """The peer saw the probe of one queue pair."""
        with self._lock:
            self._unproven.discard(queue)
            if self._unproven or not self._follow(State.READY):
                return
        self._tell(State.READY)

    def broke(self, status: int) -> None:
        """A probe failed. Called with a completion queue's lock held: another thread acts."""
        reason = f"{self.name}: the first write did not arrive: {self._context.text(status)}"
        self._context.later(lambda: self.fail(Failure(reason, rail=True)))

    def fail(self, failure: Failure) -> bool:
        """Stop it: what is under way completes as flushed. True: this call did it."""
        with self._lock:
            notes = "" if self._state is State.READY else self._context.remarks(self._peer)
            if not self._follow(State.FAILED):
                return False
            self.failure = failure
            if notes and failure.rail:
                self.failure = failure._replace(reason=f"{failure.reason} (note: {notes})")
        for queue in self.queues:
            with contextlib.suppress(VerbsError):  # it never left INIT, or the device is gone
                queue.stop()
            with contextlib.suppress(VerbsError):  # the device is gone
                queue.completions.arm()
            queue.completions.wake_starved()
        self._tell(State.FAILED)
        return True

    def _follow(self, state: State) -> bool:
        if state not in FOLLOWS[self._state]:
            return False
        self._state = state
        return True

    def _tell(self, state: State) -> None:
        self._on_state(self, state)
        with self._lock:
            waiting, self._waiting = self._waiting, set()
        for job in waiting:
            job.wake()

    def wait_for(self, job: Job) -> State:
        """Wake `job` when it is ready or failed; returns the state now."""
        with self._lock:
            if self._state in {State.CONNECTING, State.PROVING}:
                self._waiting.add(job)
            return self._state

    def post(
        self,
        job: Job,
        opcode: Opcode,
        work: Work,
        rows: slice,
        lkeys: NDArray[np.uint32],
        rkeys: NDArray[np.uint32],
        inline: int,
    ) -> int:
        """Post as many of `rows` as one queue pair takes; 0: `job` is woken when one has room.

        The one with the least of others' requests is asked first, and they take turns where that
        is level: one lane is spread over all of them, two at work at a time come to have their
        own, which different cores, or units of a NIC, then work at.
        """
        self._turn += 1  # not guarded: any turn will do
        first = self._turn % len(self.queues)
        by_turns = self.queues[first:] + self.queues[:first]
        for queue in sorted(by_turns, key=lambda queue: queue.of_others(job)):
            try:
                count = queue.post(job, opcode, work, rows, lkeys, rkeys, inline)
            except VerbsError as error:
                self.fail(Failure(f"{self.name}: {error.strerror}", rail=True))
                return 0
            if count:
                return count
        if self._state is not State.READY:  # it failed meanwhile, and perhaps before the wait
            job.wake()
        return 0

    def close(self) -> None:
        """Destroy its queue pairs; what was under way is given back. Idempotent."""
        self.fail(Failure(f"{self.name} was closed", rail=False))
        with self._lock:
            if not self._follow(State.CLOSED):
                return
        self._close_queues()

    def _close_queues(self) -> None:
        with contextlib.ExitStack() as closing:  # each of them, also when one fails
            for queue in self.queues:
                closing.callback(queue.close)
