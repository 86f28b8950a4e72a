"""What a node counts between two looks of the framework. Plain numbers, no framework types."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from mooncake_engine import Completion


class Counts(msgspec.Struct):
    """Everything since the last `Stats.take`. Lists are of batches of reads, `exposed` of requests.

    Attributes:
        seconds: Submit to last byte.
        nbytes: Bytes moved.
        descriptors: Runs before merging neighbours.
        runs: Runs after it.
        exposed: Last page computed to released by all readers.
        paths: Transport -> batches.
        requests: Requests received whole.
        failures: Reason -> requests.
        held_pages: Pages waiting for readers now; a gauge, None when it did not change.
    """

    seconds: list[float] = []
    nbytes: list[int] = []
    descriptors: list[int] = []
    runs: list[int] = []
    exposed: list[float] = []
    paths: dict[str, int] = {}
    requests: int = 0
    failures: dict[str, int] = {}
    held_pages: int | None = None


class Stats:
    """Counts of one node; any thread adds, the framework's thread takes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards _counts and _held
        self._counts: Counts | None = None
        self._held = 0

    def batch(self, completion: Completion) -> None:
        """One batch of reads moved its bytes."""
        with self._lock:
            counts = self._current()
            counts.seconds.append(completion.total_s)
            counts.nbytes.append(completion.nbytes)
            counts.descriptors.append(completion.descriptors)
            counts.runs.append(completion.runs)
            scheme = completion.path.scheme
            counts.paths[scheme] = counts.paths.get(scheme, 0) + 1

    def received(self) -> None:
        """One request's KV is here and confirmed."""
        with self._lock:
            self._current().requests += 1

    def delivered(self, exposed_s: float) -> None:
        """Decode took all of one request's KV, so long after its last page was computed."""
        with self._lock:
            self._current().exposed.append(exposed_s)

    def failure(self, reason: str) -> None:
        """One request's transfer failed; `reason` is one of a small fixed set of words."""
        with self._lock:
            failures = self._current().failures
            failures[reason] = failures.get(reason, 0) + 1

    def take(self, held_pages: int) -> Counts | None:
        """All that happened since the last call; None when nothing did."""
        if self._counts is None and held_pages == self._held:
            return None
        with self._lock:
            counts = self._current()
            counts.held_pages = self._held = held_pages
            self._counts = None
            return counts

    def _current(self) -> Counts:
        if self._counts is None:
            self._counts = Counts()
        return self._counts
