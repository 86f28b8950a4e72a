"""Bytes that tell where they came from, for checking that a transfer put each one in its place.

Both sides can make the other's bytes from its seed alone, so nothing has to be sent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Uint64s = NDArray[np.uint64]

#: A prime: offsets that differ by less than 4 GiB and by whole pages never hold the same bytes.
PERIOD = 1048573


class Pattern:
    """What the bytes of a buffer filled with `seed` are."""

    def __init__(self, seed: int) -> None:
        self._table = np.random.default_rng(seed).integers(0, 256, PERIOD, np.uint8)

    def fill(self, memory: Bytes) -> None:
        """The whole buffer, from its offset 0 on."""
        for start in range(0, memory.size, PERIOD):
            part = memory[start : start + PERIOD]
            part[:] = self._table[: part.size]

    def first_difference(self, memory: Bytes, offset: int) -> int:
        """Where `memory` differs from the pattern at `offset`, as an index; -1: nowhere."""
        for start, expected in self._pieces(offset, memory.size):
            found = memory[start : start + expected.size]
            if not np.array_equal(found, expected):
                return start + int(np.flatnonzero(found != expected)[0])
        return -1

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, Bytes]]:
        done = 0
        while done < length:
            first = (offset + done) % PERIOD
            piece = self._table[first : first + length - done]
            yield done, piece
            done += piece.size


def check(
    memory: Bytes, here: Uint64s, there: Uint64s, lengths: Uint64s, own: Pattern, other: Pattern
) -> str:
    """Empty when each run holds the other side's bytes and all else its own; else what is wrong.

    Args:
        memory: The receiving side's buffer, filled by `own` before the transfer.
        here: Offsets of the runs in it.
        there: Offsets in the sender's buffer, filled by `other`.
        lengths: Bytes of each run.
        own: Of this side's seed.
        other: Of the sender's seed.
    """
    rows = zip(here.tolist(), there.tolist(), lengths.tolist(), strict=True)
    for index, (start, source, length) in enumerate(rows):
        wrong = other.first_difference(memory[start : start + length], source)
        if wrong >= 0:
            return (
                f"descriptor {index} of {len(lengths)} ({length} bytes to offset {start} from "
                f"{source}): byte {wrong} is {memory[start + wrong]}, not what was sent"
            )
    for start, stop in _gaps(here, lengths, memory.size):
        wrong = own.first_difference(memory[start:stop], start)
        if wrong >= 0:
            return f"byte {start + wrong} lies in no descriptor and was changed all the same"
    return ""


def _gaps(here: Uint64s, lengths: Uint64s, size: int) -> list[tuple[int, int]]:
    """What no run covers, as (start, stop)."""
    order = np.argsort(here, kind="stable")
    starts = np.append(here[order].astype(np.int64), size)
    stops = np.maximum.accumulate(np.concatenate(([0], (here + lengths)[order]))).astype(np.int64)
    open_ = starts > stops
    return list(zip(stops[open_].tolist(), starts[open_].tolist(), strict=True))
