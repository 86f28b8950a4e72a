"""Measures each pair of NICs between us and a running peer, by reading memory that it registered.

Reads alone: the peer may hold KV caches there, and is not asked. What is read is thrown away.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from mooncake_engine.errors import PathUnavailable
from mooncake_engine.topology import HostPair, Measured, NicPair, cpus_near, host_of, matchings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy as np
    from mooncake_engine import Segment, TransferEngine
    from mooncake_engine.topology import Machine
    from mooncake_engine.types import RegionRecord
    from numpy.typing import NDArray

_FIRST_BYTES = 1 << 20  # tells how many bytes a measurement can take
_MOST_BYTES = 64 << 20
_LATENCY_BYTES = 8
_LATENCY_READS = 100
_ROUNDS = 4  # batches per measurement, so that the slowest second of a busy machine is one of them


@runtime_checkable
class Railed(Protocol):
    """A link that can be told which pair of NICs to use."""

    def nic_pairs(self) -> Sequence[NicPair]:
        """All pairs that there are."""

    def restrict(self, pair: NicPair | None) -> None:
        """Use this pair alone from now on; None: all again."""


def measure(
    engine: TransferEngine,
    segment: Segment,
    machine: Machine,
    *,
    seconds: float = 1.0,
    report: Callable[[str], None] = lambda _line: None,
) -> HostPair:
    """Bandwidth and latency of each pair of NICs, and the best pairs.

    Blocks for two or three times `seconds` a pair. A pair that moves nothing is reported and left
    out. Other traffic of either machine is measured with it: choose a quiet moment.

    Args:
        engine: Ours.
        segment: The peer, over a transport that is `Railed`.
        machine: Ours, for the NUMA nodes.
        seconds: How long to measure a pair's bandwidth, and its latency at most.
        report: Told a line for each pair.

    Raises:
        PathUnavailable: The transport has no pairs of NICs, the peer no memory, or no pair works.
    """
    link = segment.link.first
    if not isinstance(link, Railed):
        raise PathUnavailable(
            f"{segment.name} is reached over {segment.path.scheme}, which has no pairs of NICs to "
            "measure; rdma has"
        )
    source = max(segment.record.regions, key=lambda region: region.length, default=None)
    if source is None:
        raise PathUnavailable(
            f"{segment.name} has registered no memory that could be read; measure with a server "
            "that holds a KV cache"
        )
    probe = _Probe(engine, segment, source, seconds)
    found: list[Measured] = []
    try:
        for pair in link.nic_pairs():
            link.restrict(pair)
            outcome = probe.run(machine, pair)
            names = f"{pair.local} -> {pair.remote}"
            if isinstance(outcome, str):
                report(f"{names}  left out: {outcome}")
                continue
            found.append(outcome)
            report(f"{names}  {outcome.bandwidth:.1f} MiB/s  {outcome.latency:.1f} us")
    finally:
        link.restrict(None)
        probe.close()
    if not found:
        raise PathUnavailable(f"no pair of NICs moves bytes between us and {segment.name}")
    return HostPair(host_of(engine.name), host_of(segment.name), tuple(found), matchings(found))


class _Probe:
    """Reads from one region of the peer into memory near our NIC."""

    def __init__(
        self, engine: TransferEngine, segment: Segment, source: RegionRecord, seconds: float
    ) -> None:
        self._engine = engine
        self._segment = segment
        self._source = source
        self._seconds = seconds
        self._buffers: dict[int, NDArray[np.uint8]] = {}  # by NUMA node

    def run(self, machine: Machine, pair: NicPair) -> Measured | str:
        """The pair's figures, or why there are none."""
        nic = machine.nic(pair.local)
        numa = nic.numa if nic else -1
        buffer = self._buffer(numa, cpus_near(machine, pair.local))
        try:
            self._read(buffer, _LATENCY_BYTES)  # makes the connection
            latencies = self._repeated(buffer, _LATENCY_BYTES, _LATENCY_READS)
            first = self._read(buffer, _FIRST_BYTES)
            wanted = int(_FIRST_BYTES / first * self._seconds / _ROUNDS)
            nbytes = min(max(wanted, _FIRST_BYTES), buffer.size)
            took = statistics.median(self._repeated(buffer, nbytes))
        except _ReadFailed as exc:
            return str(exc)
        return Measured(
            pair.local,
            pair.remote,
            numa,
            pair.remote_numa,
            round(nbytes / took / (1 << 20), 2),
            round(statistics.median(latencies) * 1e6, 2),
        )

    def _repeated(self, buffer: NDArray[np.uint8], nbytes: int, most: int = 1 << 20) -> list[float]:
        """Seconds of each of at most so many reads, in the time that a measurement has."""
        end = time.monotonic() + self._seconds
        took: list[float] = []
        while len(took) < most and (not took or time.monotonic() < end):
            took.append(self._read(buffer, nbytes))
        return took

    def _buffer(self, numa: int, cpus: frozenset[int] | None) -> NDArray[np.uint8]:
        if numa not in self._buffers:
            with _pinned(cpus):  # the kernel takes a page from the node that touches it first
                buffer = self._engine.allocate(min(_MOST_BYTES, self._source.length))
                buffer.fill(1)
            self._buffers[numa] = buffer
        return self._buffers[numa]

    def _read(self, buffer: NDArray[np.uint8], nbytes: int) -> float:
        """Seconds that it took."""
        nbytes = min(nbytes, buffer.size)
        began = time.perf_counter()
        end = self._engine.submit(
            "read", self._segment, [(buffer.ctypes.data, self._source.address, nbytes)]
        ).wait()
        if not end.ok:
            raise _ReadFailed(end.error)
        return time.perf_counter() - began

    def close(self) -> None:
        for buffer in self._buffers.values():
            self._engine.unregister_memory(buffer.ctypes.data)
        self._buffers.clear()


class _ReadFailed(Exception):
    """A read ended with an error."""


@contextlib.contextmanager
def _pinned(cpus: frozenset[int] | None) -> Iterator[None]:
    """Run this thread on these CPUs, as far as it may."""
    allowed = os.sched_getaffinity(0)
    wanted = allowed & (cpus or allowed)
    if not wanted:
        yield
        return
    os.sched_setaffinity(0, wanted)
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)
