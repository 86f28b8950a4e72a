"""One slice on its way over RDMA: what is still to post, what failed, when to give up.

One thread runs it. Whatever happens, `run` ends only when none of the slice's requests is under
way any more: until then a NIC may touch its memory.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import numpy as np

from mooncake_engine.device import is_device
from mooncake_engine.errors import LaneError, PathLost
from mooncake_engine.transport.rdma import work
from mooncake_engine.transport.rdma.endpoint import Endpoint, Failure, State
from mooncake_engine.transport.rdma.gpu import gpus_of
from mooncake_engine.transport.rdma.send_queue import FLUSHED
from mooncake_engine.transport.rdma.verbs.base import Opcode
from mooncake_engine.types import Op, Status

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from numpy.typing import NDArray

    from mooncake_engine.transport.rdma.completions import Completions
    from mooncake_engine.transport.rdma.job import Failed, Job
    from mooncake_engine.transport.rdma.lane import Patience
    from mooncake_engine.transport.rdma.link import RdmaLink
    from mooncake_engine.transport.rdma.rails import Rail
    from mooncake_engine.types import Slice

_OPCODES = {Op.READ: Opcode.READ, Op.WRITE: Opcode.WRITE}

# ibv_wc_status, as far as it says who is to blame.
_OURS = {1, 4}  # LOC_LEN_ERR, LOC_PROT_ERR: our memory
# REM_ACCESS_ERR, REM_OP_ERR: theirs. Not 9, REM_INV_REQ_ERR: a request may also be invalid because
# a part of it was lost, as Soft-RoCE says when a rail goes down in mid-transfer.
_THEIRS = {10, 11}

#: Most time that may pass between two looks at endpoints that have to be reaped.
_LOOK_S = 1.0
#: Time between two looks at queue pairs that say nothing.
_LISTEN_S = 0.2
#: Within this a NIC reports an error, or that a request has ended. Soft-RoCE was seen to do neither
#: when its interfaces went down under load.
_SILENCE_S = 5.0
#: Under way at once: what a lane moves in this time, so that a cancel waits no longer; but so many
#: bytes and requests that the NIC has work while what has completed is replaced.
_WINDOW_S = 0.1
_MIN_WINDOW = 4 << 20
_MIN_REQUESTS = 4
#: A window is posted in so many chains: while one is replaced the other keeps the NIC at work.
_CHAINS = 2


class Moving:
    """The life of one slice on one lane."""

    def __init__(
        self,
        link: RdmaLink,
        piece: Slice,
        job: Job,
        deadline: float,
        interrupted: threading.Event,
        patience: Patience,
    ) -> None:
        self._link = link
        self._config = link.shared.config
        self._piece = piece
        self._job = job
        self._deadline = deadline
        self._interrupted = interrupted
        self._patience = patience
        self._failure: LaneError | None = None
        self._todo: list[tuple[Rail, slice]] = []
        self._homeless: list[slice] = []  # requests that no rail was found for yet
        self._endpoints: dict[Rail, Endpoint] = {}
        self._used: set[Endpoint] = set()  # all of them so far
        self._completions: set[Completions] = set()
        self._tries = 0
        self._keys_tried = False
        self._refusal = ""  # of the peer's NIC, with the keys that we have
        self._last_error = "every rail rests after a failure"
        self._listen_at = 0.0

    def run(self) -> None:
        """Move it. Raises `LaneError`, `PathLost` among them."""
        try:
            self._run()
        except LaneError:  # raised when nothing is under way
            raise
        except BaseException:  # a bug, or a NIC that fails altogether
            with contextlib.ExitStack() as closing:  # destroyed queue pairs touch no memory
                for endpoint in self._used:
                    closing.callback(endpoint.close)
            raise

    def _run(self) -> None:
        self._prepare()
        self._homeless.append(slice(0, self._cut.nbytes.size))
        while True:
            self._look()
            failures = self._job.take_failed()
            for failed in failures:
                self._consider(failed)
            self._count(failures)
            if self._refusal and self._job.quiet:  # what the old keys were posted with is back
                self._compare_keys()
            if self._failure is not None:
                self._todo.clear()
                self._homeless.clear()
            elif not self._refusal:
                self._place()
                self._post()
            if not self._todo and not self._homeless and self._job.quiet:
                break
            self._wait()
        if self._failure is not None:
            raise self._failure
        self._settle()

    def _settle(self) -> None:
        """Let the GPUs whose memory was written see the bytes. Raises `LaneError`."""
        if self._piece.op is Op.READ:
            self._link.shared.settle(gpus_of(self._locations))
            return
        locations = self._their_locations
        gpus = gpus_of({locations[row] for row in np.unique(self._cut.remote_rows).tolist()})
        if gpus:
            question = self._link.control.settle(gpus, self._job)
            self._await(lambda: question.answer is not None)
            if question.answer:
                raise self._error(Status.FAILED, question.answer)

    def _await(self, done: Callable[[], bool]) -> None:
        """Wait for an answer of the peer's. Raises `LaneError` when told to end before."""
        while not done():
            self._look()
            if self._failure is not None:
                raise self._failure
            self._job.wait(min(self._deadline, time.monotonic() + _LOOK_S))

    # What to move.

    def _prepare(self) -> None:
        try:
            self._cut_up()
        except work.Unregistered as missing:
            if missing.side == "local":
                raise self._error(Status.FAILED, f"{missing} with our NICs") from missing
            self._renew_keys()
            try:
                self._cut_up()
            except work.Unregistered as still:
                raise self._error(
                    Status.REFUSED, f"{still} with the peer's NICs; has it been unregistered?"
                ) from still

    def _cut_up(self) -> None:
        link, config, reads = self._link, self._config, self._piece.op is Op.READ
        own = link.shared.registrations.snapshot
        self._theirs, self._their_locations = link.control.keys
        self._ours = own.table
        self._cut = work.cut(
            self._piece,
            own.table,
            self._theirs,
            slice_bytes=config.slice_bytes,
            fragment_ratio=config.fragment_ratio,
            max_sge=link.shared.max_read_sge if reads else link.shared.max_sge,
        )
        self._location = (
            str(own.locations[self._cut.local_rows[0]]),
            self._their_locations[int(self._cut.remote_rows[0])],
        )
        self._locations = set(own.location_of(np.unique(self._cut.local_rows)).tolist())
        rails = link.rails_of(*self._location)
        if config.path_round_robin and len(rails) > 1:
            self._cut = self._cut.dealt(len(rails))
        self._job.begin(self._cut.nbytes)
        self._inline = config.max_inline if not any(map(is_device, self._locations)) else 0
        self._keys: dict[Rail, tuple[NDArray[np.uint32], NDArray[np.uint32]]] = {}

    def _keys_of(self, rail: Rail) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        keys = self._keys.get(rail)
        if keys is None:
            lkeys = self._ours.keys[rail.local][self._cut.local_rows]
            rkeys = self._theirs.keys[rail.remote][self._cut.remote_rows]
            keys = self._keys[rail] = lkeys, rkeys
        return keys

    def _renew_keys(self) -> None:
        """Ask for the peer's keys and wait for the answer. Raises `LaneError` when told to end."""
        control = self._link.control
        question = control.ask_for_keys(self._job)
        self._await(lambda: control.keys_told >= question)

    # What ends it early.

    def _look(self) -> None:
        now = time.monotonic()
        if self._failure is None:
            if self._interrupted.is_set():
                self._fail(Status.CANCELLED, "the lane was interrupted")
            elif self._link.control.gone:
                self._fail(Status.PEER_GONE, self._link.control.gone)
            elif now >= self._deadline:
                self._fail(Status.TIMED_OUT, "it did not end by its deadline")
        if now >= self._listen_at:
            self._listen_at = now + _LISTEN_S
            self._end_silence(now)

    def _end_silence(self, now: float) -> None:
        """Give up queue pairs that owe a completion for too long."""
        config = self._config
        limit = config.slice_timeout_s
        if limit <= 0:
            nic_s = 4.096e-6 * 2**config.send_timeout * (config.send_retry_count + 1)
            limit = max(_SILENCE_S, 4 * nic_s)  # a NIC may take 4 times as long as it was told
        for endpoint in self._endpoints.values():
            if endpoint.silence(now) > limit:
                reason = f"{endpoint.name} moved nothing for {limit:g} s"
                endpoint.fail(Failure(reason, rail=True))

    def _fail(self, status: Status, reason: str) -> None:
        self._failure = self._failure or self._error(status, reason)

    def _error(self, status: Status, reason: str) -> LaneError:
        return LaneError(status, f"{self._what()}: {reason}")

    def _what(self) -> str:
        piece = self._piece
        return (
            f"{piece.op} of {piece.nbytes} bytes in {piece.remote.size} runs over rdma with "
            f"{self._link.name}"
        )

    def _consider(self, failed: Failed) -> None:
        """Requests came back failed: once more, over another rail, or never."""
        endpoint, status = failed.endpoint, failed.status
        text = f"{endpoint.name}: {self._link.shared.text(status)}"
        if status == FLUSHED:  # by another request's failure, which perhaps nobody looked at yet
            cause = endpoint.broken
            rail = cause not in {0, FLUSHED} | _OURS | _THEIRS
            text = f"{endpoint.name}: {self._link.shared.text(cause or status)}"
            endpoint.fail(Failure(text, rail=rail))
        elif status in _OURS:
            endpoint.fail(Failure(text, rail=False))
            self._fail(Status.FAILED, f"{text}; is the local memory still registered?")
        elif status in _THEIRS:
            endpoint.fail(Failure(text, rail=False))
            self._refusal = text
        else:
            endpoint.fail(Failure(text, rail=True))
        if endpoint.failure is not None:
            self._last_error = endpoint.failure.reason
        self._endpoints.pop(endpoint.rail, None)
        if failed.rows.stop > failed.rows.start:
            self._homeless.append(failed.rows)

    def _count(self, failures: list[Failed]) -> None:
        """One try more, however many rails and queue pairs failed at once."""
        known = {0, FLUSHED} | _OURS | _THEIRS
        if any(failed.status not in known for failed in failures):
            self._tries += 1
        limit = self._config.retry_count
        if self._tries > limit and self._failure is None:
            self._failure = PathLost(
                f"{self._what()}: given up after {limit} retries; {self._last_error}"
            )

    def _compare_keys(self) -> None:
        """The peer's NIC says no. Its keys may be newer than ours: registered again meanwhile."""
        text, self._refusal = self._refusal, ""
        if not self._keys_tried and self._failure is None:
            self._keys_tried = True
            old = self._theirs
            try:
                self._renew_keys()
            except LaneError:
                return
            self._theirs, self._their_locations = self._link.control.keys
            rows = self._theirs.locate(self._cut.work.remote)
            same = (rows >= 0).all() and all(
                bool((new[rows] == before[self._cut.remote_rows]).all())
                for new, before in zip(self._theirs.keys, old.keys, strict=True)
            )
            if not same and (rows >= 0).all():
                self._cut = self._cut._replace(remote_rows=rows)
                self._keys.clear()
                return
        self._fail(Status.REFUSED, f"the peer's NIC refused it ({text}); has it unregistered it?")

    # Posting.

    def _place(self) -> None:
        """Find rails for what has none. With none that works, and none being tried: the end."""
        homeless, self._homeless = self._homeless, []
        for rows in homeless:
            rails = self._link.rails_of(*self._location)
            if rails:
                self._todo += self._link.share(rows, rails)
            elif self._link.trying(self._job):
                self._homeless.append(rows)
            elif self._failure is None:
                why = self._link.why_down or self._last_error
                self._failure = PathLost(f"{self._what()}: no rail works: {why}")

    def _post(self) -> None:
        left: list[tuple[Rail, slice]] = []
        for rail, rows in self._todo:
            endpoint = self._ready(rail)
            if endpoint is None:
                self._homeless.append(rows)
                self._job.wake()  # look for another rail at once
                continue
            rest = rows if endpoint.state is not State.READY else self._post_some(endpoint, rows)
            if rest.stop > rest.start:
                left.append((rail, rest))
        self._todo = left

    def _ready(self, rail: Rail) -> Endpoint | None:
        """The rail's endpoint, ready or on the way; None: it has failed."""
        endpoint = self._endpoints.get(rail)
        if endpoint is None or endpoint.state is not State.READY:
            endpoint = self._link.endpoint(rail)
            if endpoint is None or endpoint.wait_for(self._job) in {State.FAILED, State.CLOSED}:
                if endpoint is not None and endpoint.failure is not None:
                    self._last_error = endpoint.failure.reason
                self._endpoints.pop(rail, None)
                return None
            self._endpoints[rail] = endpoint
            self._used.add(endpoint)
            self._completions.update(queue.completions for queue in endpoint.queues)
        return endpoint

    def _post_some(self, endpoint: Endpoint, rows: slice) -> slice:
        """Post what the window and the queues have room for; returns the rest."""
        job, config = self._job, self._config
        window = max(
            _MIN_WINDOW, _MIN_REQUESTS * config.slice_bytes, int(self._link.rate * _WINDOW_S)
        )
        lkeys, rkeys = self._keys_of(endpoint.rail)
        while rows.stop > rows.start:
            room = window - job.bytes_under_way
            if room <= 0:
                break
            share = -(-(rows.stop - rows.start) // len(endpoint.queues))
            limit = rows.start + min(config.max_chain, share)
            some = job.within(slice(rows.start, limit), min(room, window // _CHAINS))
            count = endpoint.post(
                job, _OPCODES[self._piece.op], self._cut.work, some, lkeys, rkeys, self._inline
            )
            if not count:
                break
            rows = slice(rows.start + count, rows.stop)
        return rows

    # Waiting.

    def _wait(self) -> None:
        began = time.monotonic()
        if not self._polled(began + self._patience.seconds):
            for completions in self._completions:
                completions.arm()  # and polls once more
            until = began + _LOOK_S if self._failure else min(self._deadline, began + _LOOK_S)
            self._job.wait(until)
        now = time.monotonic()
        self._patience.waited(now - began)
        if now - began >= _LOOK_S / 2:
            self._link.reap()

    def _polled(self, end: float) -> bool:
        """Poll until something changes or `end`; True: something did."""
        job = self._job
        while not job.woken:
            if time.monotonic() >= end or not job.under_way:
                return False
            for completions in self._completions:
                completions.poll()
        job.wait(0.0)  # forget that it was woken
        return True
