"""The segments that an engine has open: one per peer, incarnation and protocol asked for."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from mooncake_engine.batch import Failure
from mooncake_engine.errors import EngineClosed
from mooncake_engine.types import Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from mooncake_engine.segment import Segment
    from mooncake_engine.types import SegmentRecord


class Peers:
    """Safe to call from any thread."""

    def __init__(self, connect: Callable[[SegmentRecord, str | None], Segment]) -> None:
        """Args: connect: opens a new segment to a record over a protocol (None: config's)."""
        self._connect = connect
        self._lock = threading.Lock()  # guards both below; never held while connecting
        self._segments: dict[tuple[str, str | None], Segment] = {}
        self._closed = False

    def open(self, record: SegmentRecord, protocol: str | None) -> Segment:
        """The segment of this record, new or already open."""
        key = (record.name, protocol)
        known = self._usable(key, record)
        if known is not None:
            known.update(record)
            return known
        segment = self._connect(record, protocol)
        with self._lock:
            # Another thread may have been as quick: the first one stays.
            stays = None if self._closed else self._usable_locked(key, record) or segment
            outdated = [s for s in self._segments.values() if _superseded(s, record)]
            self._segments = {k: s for k, s in self._segments.items() if s not in outdated}
            if stays is not None:
                self._segments[key] = stays
        if stays is not segment:
            segment.close()
        for old in outdated:
            old.close(
                Failure(
                    Status.PEER_GONE, f"{record.name} was restarted; its old addresses are void"
                )
            )
        if stays is None:
            raise EngineClosed(f"the engine was closed while it connected to {record.name}")
        return stays

    def close(self) -> None:
        """End all. Blocks until every lane let go of local memory. Idempotent."""
        with self._lock:
            self._closed = True
            segments = list(self._segments.values())
        # Ask all before waiting for one, so that the waits overlap.
        failure = Failure(Status.CANCELLED, "the engine was closed")
        for segment in segments:
            segment.stop_all(failure)
        for segment in segments:
            segment.close(failure)

    def _usable(self, key: tuple[str, str | None], record: SegmentRecord) -> Segment | None:
        with self._lock:
            return self._usable_locked(key, record)

    def _usable_locked(self, key: tuple[str, str | None], record: SegmentRecord) -> Segment | None:
        known = self._segments.get(key)
        if known is None or known.closed or known.incarnation != record.incarnation:
            return None
        return known


def _superseded(segment: Segment, record: SegmentRecord) -> bool:
    return segment.name == record.name and segment.incarnation != record.incarnation
