"""What is registered: regions, and the bounds check that both sides use."""

from __future__ import annotations

import contextlib
import operator
import threading
from bisect import bisect_right
from typing import TYPE_CHECKING

import numpy as np

from mooncake_engine.errors import InvalidTransfer, OutOfBounds
from mooncake_engine.types import Region, RegionRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Protocol

    from mooncake_engine.types import Uint64s

    class Ledger(Protocol):
        """Another server of this memory, beside Python's: `mooncake_engine.native.ledgers`."""

        def replace(self, starts: Uint64s, ends: Uint64s, gone: tuple[int, int] = ...) -> None:
            """Permit these ranges only; who touches `gone` has left when this returns."""


#: Up to so many runs a loop over ints is quicker than numpy, whose calls take 1 us and more: 1 us
#: instead of 11 for one run, 3 instead of 7 for 16.
FEW = 24


class Bounds:
    """Sorted, disjoint address ranges; `check` is one vectorised look-up."""

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        """Args: ranges: (address, length) pairs that do not overlap."""
        joined: list[list[int]] = []  # touching ranges are one: a merged run may span them
        for start, length in sorted(ranges):
            if joined and joined[-1][1] == start:
                joined[-1][1] = start + length
            else:
                joined.append([start, start + length])
        self.starts = np.array([start for start, _ in joined], np.uint64)
        self.ends = np.array([end for _, end in joined], np.uint64)
        self._ranges = [start for start, _ in joined], [end for _, end in joined]

    def check(self, addresses: Uint64s, lengths: Uint64s, whose: str) -> None:
        """Raise `OutOfBounds`, naming the first run that lies in no single range."""
        if not addresses.size:
            return
        if not self.starts.size:
            raise OutOfBounds(f"{whose} has no registered memory; register it before a transfer")
        if addresses.size <= FEW:
            starts, sizes = addresses.tolist(), lengths.tolist()
            hull = min(starts), max(map(operator.add, starts, sizes))
        else:
            hull = int(addresses.min()), int(addresses.max()) + int(lengths.max())
        slot = bisect_right(self._ranges[0], hull[0]) - 1
        if slot >= 0 and hull[1] <= self._ranges[1][slot]:
            return  # all in one range: the closer look takes three to ten times as long
        if addresses.size <= FEW and self._hold(starts, sizes):
            return
        slots = np.searchsorted(self.starts, addresses, side="right").astype(np.int64) - 1
        inside = slots >= 0
        room = self.ends[np.maximum(slots, 0)] - addresses  # wraps when addresses > end
        inside &= (addresses <= self.ends[np.maximum(slots, 0)]) & (lengths <= room)
        if not inside.all():
            bad = int(np.argmin(inside))
            raise OutOfBounds(
                f"run {bad} of {addresses.size}: {int(lengths[bad])} bytes at "
                f"{int(addresses[bad]):#x} lie outside every region that {whose} registered"
            )

    def _hold(self, addresses: list[int], lengths: list[int]) -> bool:
        """`check` of a few runs; it tells which one is outside."""
        starts, ends = self._ranges
        for address, length in zip(addresses, lengths, strict=True):
            slot = bisect_right(starts, address) - 1
            if slot < 0 or address + length > ends[slot]:
                return False
        return True


class _Use:
    """A peer's slice that touches our memory right now."""

    __slots__ = ("addresses", "interrupt", "lengths")

    def __init__(self, addresses: Uint64s, lengths: Uint64s, interrupt: Callable[[], None]) -> None:
        self.addresses = addresses
        self.lengths = lengths
        self.interrupt = interrupt

    def touches(self, region: Region) -> bool:
        start, end = np.uint64(region.address), np.uint64(region.address + region.length)
        return bool(((self.addresses < end) & (self.addresses + self.lengths > start)).any())


class RegionTable:
    """Regions of this process. Safe to call from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Condition()  # guards all below; bounds: its swap
        self._regions: dict[int, Region] = {}
        #: What is registered now; another object after each change.
        self.bounds: Bounds = Bounds()
        self._uses: set[_Use] = set()
        self._ledgers: list[Ledger] = []

    def follow(self, ledger: Ledger) -> None:
        """Keep `ledger` equal to this table, from now on."""
        with self._lock:
            ledger.replace(self.bounds.starts, self.bounds.ends)
            self._ledgers.append(ledger)

    def add(self, region: Region) -> None:
        """Register; raises `InvalidTransfer` when it overlaps another region."""
        if region.length <= 0 or region.address <= 0:
            raise InvalidTransfer(
                f"cannot register {region.length} bytes at {region.address:#x}: "
                "address and length must be positive"
            )
        with self._lock:
            for other in self._regions.values():
                if (
                    region.address < other.address + other.length
                    and other.address < region.address + region.length
                ):
                    raise InvalidTransfer(
                        f"{region.length} bytes at {region.address:#x} overlap the region of "
                        f"{other.length} bytes at {other.address:#x}; unregister that one first"
                    )
            self._regions[region.address] = region
            self._rebuild()

    def at(self, address: int) -> Region:
        """The region that starts at `address`; `InvalidTransfer` when there is none."""
        with self._lock:
            region = self._regions.get(address)
        if region is None:
            raise InvalidTransfer(f"no region starts at {address:#x}; nothing to unregister")
        return region

    def remove(self, address: int) -> Region:
        """Unregister the region that starts at `address`; `InvalidTransfer` when there is none.

        Peers' slices that touch it are interrupted first and have left when this returns, so the
        memory may be freed. Blocks for the time that one interrupted system call takes.
        """
        with self._lock:
            region = self._regions.pop(address, None)
            if region is None:
                raise InvalidTransfer(f"no region starts at {address:#x}; nothing to unregister")
            self._rebuild((address, address + region.length))
            ending = {use for use in self._uses if use.touches(region)}
            for use in ending:
                use.interrupt()
            self._lock.wait_for(lambda: not ending & self._uses)
            return region

    @contextlib.contextmanager
    def serving(
        self, addresses: Uint64s, lengths: Uint64s, interrupt: Callable[[], None]
    ) -> Iterator[None]:
        """Touch these runs for a peer; `interrupt` is called when a region is removed meanwhile.

        Raises:
            OutOfBounds: Unless each run lies inside one region.
        """
        use = _Use(addresses, lengths, interrupt)
        with self._lock:
            self.bounds.check(addresses, lengths, "this engine")
            self._uses.add(use)
        try:
            yield
        finally:
            with self._lock:
                self._uses.remove(use)
                self._lock.notify_all()

    def _rebuild(self, gone: tuple[int, int] = (0, 0)) -> None:
        self.bounds = Bounds((r.address, r.length) for r in self._regions.values())
        for ledger in self._ledgers:  # under the lock: two changes arrive in their order
            ledger.replace(self.bounds.starts, self.bounds.ends, gone)

    def check(self, addresses: Uint64s, lengths: Uint64s, whose: str = "this engine") -> None:
        """Raise `OutOfBounds` unless each run lies inside one region."""
        self.bounds.check(addresses, lengths, whose)

    def records(self) -> tuple[RegionRecord, ...]:
        """What peers may know."""
        with self._lock:
            return tuple(
                RegionRecord(r.address, r.length, r.location) for r in self._regions.values()
            )
