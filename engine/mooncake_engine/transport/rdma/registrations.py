"""Our own registered memory: the regions held on all of our NICs, and the keys that this gives."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mooncake_engine.errors import EngineClosed, InvalidTransfer
from mooncake_engine.transport.rdma.chunks import cut
from mooncake_engine.transport.rdma.keys import KeyRow, KeyTable
from mooncake_engine.transport.rdma.pinning import Pinning, deregister

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from mooncake_engine.config import RdmaConfig
    from mooncake_engine.transport.rdma.gpu import Gpu
    from mooncake_engine.transport.rdma.verbs.base import Device, MemoryRegion
    from mooncake_engine.types import Region


class Snapshot(NamedTuple):
    """All that is registered at one moment; never changes. Rows are chunks, sorted by address.

    Attributes:
        generation: Grows with each change.
        table: Our lkeys.
        rkeys: What peers need to reach this memory.
        locations: Of each row, shape (rows,), text: "cpu", "cuda:0".
    """

    generation: int
    table: KeyTable
    rkeys: tuple[KeyRow, ...]
    locations: NDArray[np.str_]

    def location_of(self, rows: NDArray[np.int64]) -> NDArray[np.str_]:
        """Where the memory of these rows of `table` is; shape (n,) to shape (n,)."""
        found: NDArray[np.str_] = self.locations[rows]
        return found


class _Held(NamedTuple):
    region: Region
    chunks: list[tuple[int, int]]
    made: list[MemoryRegion]  # of the first chunk, one for each device; then of the next


class Registrations:
    """Registers regions with all devices. Safe from any thread; `snapshot` takes no lock."""

    def __init__(self, devices: Sequence[Device], config: RdmaConfig, gpu: Gpu) -> None:
        """Register nothing yet. The devices stay the caller's to close, after this.

        Args:
            devices: In the order in which their keys are told.
            config: Limits, threads, relaxed ordering.
            gpu: Registers memory of GPUs.
        """
        self._pinning = Pinning(devices, config, gpu)
        limits = [device.attributes().max_mr_size for device in devices]
        self._longest = min([config.max_mr_bytes, *(limit for limit in limits if limit)])
        self._lock = threading.Lock()  # guards _held, _closed and the swap of _snapshot
        self._held: dict[int, _Held] = {}
        self._closed = False
        self._snapshot = _snapshot(0, (), len(devices))

    @property
    def snapshot(self) -> Snapshot:
        """What is registered now. Take it once for all that must agree."""
        return self._snapshot

    def add(self, region: Region) -> None:
        """Register a region with all devices, or with none. Blocks while its pages are pinned.

        Raises:
            PathUnavailable: A device refuses it, or the limit of locked memory is too low.
            InvalidTransfer: A region that starts there is registered already.
            EngineClosed: `close` was called.
        """
        chunks = cut(region, self._longest)
        held = _Held(region, chunks, self._pinning.register(region, chunks))
        with self._lock:
            closed, known = self._closed, region.address in self._held
            if not closed and not known:
                self._held[region.address] = held
                self._swap()
                return
        deregister(region, held.made)
        if closed:
            raise EngineClosed("the RDMA transport was closed while memory was registered")
        raise InvalidTransfer(f"the region at {region.address:#x} is registered already")

    def remove(self, address: int) -> None:
        """Deregister the region that starts there; afterwards none of our NICs can reach it.

        After `close` there is nothing left to do.

        Raises:
            InvalidTransfer: No such region.
            PathUnavailable: A device refuses: the region is forgotten, but may be reached still.
        """
        with self._lock:
            if self._closed:
                return
            held = self._held.pop(address, None)
            if held is None:
                raise InvalidTransfer(f"no region starts at {address:#x}; nothing to deregister")
            self._swap()
        deregister(held.region, held.made)

    def close(self) -> None:
        """Deregister all; idempotent. Nothing can be added any more. Raises as `remove` does."""
        with self._lock:
            self._closed = True
            ending, self._held = list(self._held.values()), {}
            self._swap()
        with contextlib.ExitStack() as closing:
            for held in ending:
                closing.callback(deregister, held.region, held.made)

    def _swap(self) -> None:
        held = sorted(self._held.values(), key=lambda one: one.region.address)
        self._snapshot = _snapshot(self._snapshot.generation + 1, held, len(self._pinning.devices))


def _snapshot(generation: int, held: Iterable[_Held], devices: int) -> Snapshot:
    local: list[KeyRow] = []
    remote: list[KeyRow] = []
    locations: list[str] = []
    for one in held:
        for number, (address, length) in enumerate(one.chunks):
            made = one.made[number * devices : (number + 1) * devices]
            local.append(KeyRow(address, length, tuple(each.lkey for each in made)))
            remote.append(KeyRow(address, length, tuple(each.rkey for each in made)))
            locations.append(one.region.location)
    return Snapshot(
        generation, KeyTable(local, devices), tuple(remote), np.array(locations, np.str_)
    )
