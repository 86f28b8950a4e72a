"""Moves one engine slice at a time: cut to work requests, spread over rails, tried again."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from typing_extensions import override

from mooncake_engine.transport.base import Lane
from mooncake_engine.transport.rdma.job import Job
from mooncake_engine.transport.rdma.moving import Moving

if TYPE_CHECKING:
    from mooncake_engine.transport.rdma.link import RdmaLink
    from mooncake_engine.types import Slice


class Patience:
    """Whether to poll for a completion or to sleep at once: what paid off last time.

    Polling costs the interpreter to whoever shares it, a sleep costs one switch of threads.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit = limit_s
        self._usual = 0.0  # seconds that a wait takes of late

    @property
    def seconds(self) -> float:
        """How long to poll; 0: waits are longer than the limit, so sleep at once."""
        return self._limit if self._usual <= self._limit else 0.0

    def waited(self, seconds: float) -> None:
        """A wait ended."""
        self._usual += 0.25 * (min(seconds, 4 * self._limit) - self._usual)


class RdmaLane(Lane):
    """Lanes share the link's queue pairs, so an interrupt waits for its own requests only."""

    def __init__(self, link: RdmaLink) -> None:
        self._link = link
        self._job = Job()
        self._patience = Patience(link.shared.config.poll_us / 1e6)
        self._interrupted = threading.Event()

    @override
    def move(self, piece: Slice, deadline: float) -> None:
        began = time.monotonic()
        moving = Moving(self._link, piece, self._job, deadline, self._interrupted, self._patience)
        moving.run()
        self._link.note_rate(piece.nbytes, time.monotonic() - began)

    @override
    def interrupt(self) -> None:
        self._interrupted.set()
        self._job.wake()

    @override
    def close(self) -> None:
        """A lane holds nothing: the queue pairs are the link's."""
