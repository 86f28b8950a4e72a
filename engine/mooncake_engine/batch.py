"""One submitted transfer: which of its slices wait or move, and its one completion."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from typing_extensions import override

from mooncake_engine.types import Completion, Path, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable
    from typing import Self

    from mooncake_engine.slicing import Plan
    from mooncake_engine.types import Slice

_log = logging.getLogger(__name__)


class Failure(NamedTuple):
    """Why a batch ends with something else than OK."""

    status: Status
    error: str


class Progress:
    """Slices that wait and slices that move. Pure; the lock of the batch's worker guards it.

    `stop` and `returned` answer True exactly once in a batch's life, to the caller that has to
    end the batch. A batch without slices starts ended; its submitter ends it.
    """

    __slots__ = ("_moving", "_waiting", "failure")

    def __init__(self, slices: Iterable[Slice]) -> None:
        self._waiting = deque(slices)
        self._moving = 0
        self.failure: Failure | None = None

    @property
    def waiting(self) -> int:
        """Slices that no lane took yet."""
        return len(self._waiting)

    @property
    def ended(self) -> bool:
        """Nothing waits, nothing moves."""
        return not self._waiting and not self._moving

    def take(self) -> Slice:
        """The next slice; a lane moves it from now on."""
        self._moving += 1
        return self._waiting.popleft()

    def returned(self, failure: Failure | None) -> bool:
        """A lane let go of its slice. True: that was the last one, end the batch."""
        self._moving -= 1
        if failure is not None:
            self._fail(failure)
        return self.ended

    def stop(self, failure: Failure) -> bool:
        """Drop what waits; the first failure counts. True: nothing moves, end the batch."""
        if self.ended:
            return False
        self._fail(failure)
        return self.ended

    def _fail(self, failure: Failure) -> None:
        self.failure = self.failure or failure
        self._waiting.clear()


#: For the few lines in which a batch ends, whose batch it is: a lock of its own costs more.
_ENDING = threading.Lock()


class Batch:
    """A transfer under way. Its methods may be called from any thread; `await batch` works too.

    Exactly one `Completion` ends it. The engine keeps a batch alive until then, so that a caller
    may forget it.
    """

    __slots__ = (
        *("plan", "op", "path", "progress", "nbytes", "submitted", "deadline", "first_taken"),
        "moved_at",
        *("_stop", "_on_end", "_completion", "_callbacks", "_ended", "__weakref__"),
    )

    def __init__(
        self,
        plan: Plan,
        path: Path,
        timeout: float,
        stop: Callable[[Batch, Failure], None],
        on_end: Callable[[Batch, Completion], None],
    ) -> None:
        """Made by the engine only; `stop` asks the worker, `on_end` runs before anybody wakes."""
        self.plan = plan
        self.op = plan.op
        self.path = path  # that of the segment, until a slice had to take another
        self.progress = Progress(plan.slices)
        self.nbytes = plan.nbytes
        self.submitted = time.monotonic()
        self.deadline = self.submitted + timeout
        self.first_taken: float | None = None  # monotonic second; set by the worker
        self.moved_at = 0.0  # ditto, when the last of its slices had been moved
        self._stop = stop
        self._on_end = on_end
        # Guarded by _ENDING:
        self._completion: Completion | None = None
        self._callbacks: list[Callable[[Completion], object]] | None = None
        self._ended: threading.Event | None = None  # for who waits; most ends are not waited for

    @override
    def __repr__(self) -> str:
        state = self._completion.status if self._completion else "running"
        return f"<Batch {self.op} {self.nbytes} bytes over {self.path.scheme}: {state}>"

    def poll(self) -> Completion | None:
        """The completion, or None while bytes may still move. Never waits."""
        return self._completion

    def wait(self, timeout: float | None = None) -> Completion:
        """Block until the batch ended, at most `timeout` seconds.

        Without a timeout the engine's own limit applies: every batch ends by its deadline.

        Raises:
            TimeoutError: Still running; the batch goes on.
        """
        end = self.poll()
        if end is not None:
            return end
        with _ENDING:
            ended = self._ended = self._ended or threading.Event()
            if self._completion is not None:
                ended.set()
        if not ended.wait(timeout) or (end := self.poll()) is None:
            raise TimeoutError(f"{self!r} has not ended within {timeout} s; it goes on")
        return end

    def cancel(self) -> None:
        """Ask for an early end. Never waits; idempotent; no effect on an ended batch.

        The completion (CANCELLED) comes when every lane that moved one of its slices was
        interrupted and has let go of the local memory: `wait()` for it before freeing pages.
        """
        self._stop(self, Failure(Status.CANCELLED, "cancelled by the caller"))

    def expire(self) -> None:
        """End it TIMED_OUT; for the engine's deadline thread."""
        limit = self.deadline - self.submitted
        self._stop(
            self,
            Failure(
                Status.TIMED_OUT,
                f"{self.op} of {self.nbytes} bytes over {self.path.scheme} did not end within "
                f"{limit:g} s; look at the peer, or raise transfer_timeout_s",
            ),
        )

    def add_done_callback(self, callback: Callable[[Completion], object]) -> None:
        """Call `callback(completion)` once: at once if ended, else on the thread that ends it.

        It holds up that thread, which serves other batches too: keep it short. What it raises is
        logged.
        """
        with _ENDING:
            if self._completion is None:
                self._callbacks = [*(self._callbacks or ()), callback]
                return
        _call(callback, self._completion)

    def __await__(self) -> Generator[object, None, Completion]:
        """The completion. Cancelling the awaiting task leaves the batch running."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Completion] = loop.create_future()

        def resolve(completion: Completion) -> None:
            if not future.done():
                future.set_result(completion)

        def wake(completion: Completion) -> None:
            try:
                loop.call_soon_threadsafe(resolve, completion)
            except RuntimeError:  # the loop was closed: nobody waits any more
                _log.debug("%r ended after the loop that awaited it", self)

        self.add_done_callback(wake)
        return future.__await__()

    def ended(self, end: Completion) -> Self:
        """Itself, for a batch that was over before it was made."""
        self._completion = end
        return self

    def finish(self, failure: Failure | None) -> None:
        """End the batch. Called once, by whoever `Progress` (or an empty submit) told to."""
        now = self.moved_at or time.monotonic()
        completion = Completion(
            status=failure.status if failure else Status.OK,
            error=failure.error if failure else "",
            nbytes=self.nbytes,
            path=self.path,
            descriptors=self.plan.descriptors,
            runs=self.plan.runs.lengths.size,
            queued_s=(self.first_taken or now) - self.submitted,
            total_s=now - self.submitted,
        )
        self._on_end(self, completion)
        with _ENDING:
            if self._completion is not None:
                raise AssertionError(f"{self!r} was ended twice; second: {completion}")
            self._completion = completion
            callbacks, self._callbacks = self._callbacks or (), None
            ended = self._ended
        if ended is not None:
            ended.set()
        for callback in callbacks:
            _call(callback, completion)


def _call(callback: Callable[[Completion], object], completion: Completion) -> None:
    try:
        callback(completion)
    except Exception:  # noqa: BLE001 - a caller's bug must not end a worker
        _log.exception("a done callback failed; its batch ended %s", completion.status)
