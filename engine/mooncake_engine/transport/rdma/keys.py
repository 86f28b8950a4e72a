"""Which key opens which address, on each of a side's devices.

A side registers each region on all of its devices, in one chunk or several; a chunk is a row here.
The same table serves both ends: of our own lkeys, and of the rkeys that a peer told us.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from mooncake_engine.types import Uint64s


class KeyRow(msgspec.Struct, frozen=True, array_like=True):
    """One registered chunk of memory, as it is told to peers."""

    address: int
    length: int  # bytes, > 0
    keys: tuple[int, ...]  # one for each of the owner's devices, in the owner's order


class KeyTable:
    """Rows sorted by address; a look-up is one vectorised search. Never changes.

    Attributes:
        starts: First address of each row, shape (rows,).
        ends: Address behind the last byte of each row, shape (rows,).
        keys: Shape (devices, rows), uint32.
    """

    __slots__ = ("ends", "keys", "starts")

    def __init__(self, rows: Iterable[KeyRow], devices: int | None = None) -> None:
        """Sort the rows.

        Args:
            rows: In any order; they do not overlap.
            devices: Keys in each row; None: as many as the first has.

        Raises:
            ValueError: Rows that overlap, are empty, or have another number of keys. A peer's bad
                rows end its connection; our own cannot be such.
        """
        ordered = sorted(rows, key=lambda row: row.address)
        if devices is None:
            devices = len(ordered[0].keys) if ordered else 0
        for row in ordered:
            _check(row, devices)
        self.starts = np.array([row.address for row in ordered], np.uint64)
        self.ends = np.array([row.address + row.length for row in ordered], np.uint64)
        by_row = np.array([row.keys for row in ordered], np.uint32).reshape(len(ordered), devices)
        self.keys = np.ascontiguousarray(by_row.T)
        crossing = np.flatnonzero(self.ends[:-1] > self.starts[1:])
        if crossing.size:
            first, second = ordered[crossing[0]], ordered[crossing[0] + 1]
            raise ValueError(
                f"{first.length} registered bytes at {first.address:#x} overlap those at "
                f"{second.address:#x}"
            )

    def __len__(self) -> int:
        return int(self.starts.size)

    def locate(self, addresses: Uint64s) -> NDArray[np.int64]:
        """The row of each address; -1: it lies in none. Shape (n,) to shape (n,).

        A run may go on behind its row's end: rows of one region touch (`ends`).
        """
        slot = np.searchsorted(self.starts, addresses, side="right").astype(np.int64) - 1
        if not len(self):
            return slot
        slot[addresses >= self.ends[np.maximum(slot, 0)]] = -1
        return slot


def _check(row: KeyRow, devices: int) -> None:
    if len(row.keys) != devices:
        raise ValueError(
            f"the {row.length} bytes at {row.address:#x} have {len(row.keys)} keys for "
            f"{devices} devices"
        )
    if row.address < 0 or row.length <= 0 or row.address + row.length >= 1 << 64:
        raise ValueError(f"{row.length} bytes at {row.address:#x} are no memory")
    if not all(0 <= key < 1 << 32 for key in row.keys):
        raise ValueError(f"the keys {row.keys} of {row.address:#x} do not all have 32 bits")
