"""Prepared runs of the C loops: who moves which part of the list, and the threads that do."""

from __future__ import annotations

import ctypes
import os
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np

from mooncake_connector.bench.base import BackendFailed, Transfer
from mooncake_connector.bench.compiled import library

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Uint64s = NDArray[np.uint64]

IOVEC = np.dtype([("base", "<u8"), ("len", "<u8")])  # struct iovec of 64-bit Linux
CUT = 4096  # a run is cut between two parts at a multiple of it, so a page has one thread


def address_of(array: NDArray[Any]) -> int:
    """Address of the first byte; `array.ctypes.data` says the same and takes 5 us for it."""
    return int(array.__array_interface__["data"][0])


def iovecs(bases: Uint64s, lengths: Uint64s) -> NDArray[np.void]:
    """One `struct iovec` per run."""
    runs = np.empty(bases.size, IOVEC)
    runs["base"] = bases
    runs["len"] = lengths
    return runs


def split(transfer: Transfer, parts: int) -> list[Transfer]:
    """At most `parts` transfers of about the same bytes, in the list's order; none is empty."""
    ends = np.cumsum(transfer.lengths)
    total = int(ends[-1])
    cuts = [total * part // parts // CUT * CUT for part in range(1, parts)]
    inner = np.unique(np.array([cut for cut in cuts if cut], np.uint64))
    zero = np.zeros(1, np.uint64)
    starts = np.unique(np.concatenate((zero, ends[:-1], inner)))
    lengths = np.append(starts[1:], ends[-1:]) - starts
    row = np.searchsorted(ends, starts, side="right")
    into = starts - (ends[row] - transfer.lengths[row])
    local, remote = transfer.local[row] + into, transfer.remote[row] + into
    first = np.searchsorted(starts, np.concatenate((zero, inner)))
    return [
        Transfer(transfer.op, local[rows], remote[rows], lengths[rows])
        for rows in map(slice, first, [*first[1:], starts.size])
    ]


def joined(bases: Uint64s, lengths: Uint64s) -> tuple[Uint64s, Uint64s]:
    """The same bytes in the same order, runs that touch made one: each saves the kernel 50 ns."""
    first = np.flatnonzero(np.append(True, bases[1:] != bases[:-1] + lengths[:-1]))
    return bases[first], np.add.reduceat(lengths, first)


def check_bounds(offsets: Uint64s, lengths: Uint64s, size: int, whose: str) -> None:
    """Raise `BackendFailed` unless each run lies inside `size` bytes."""
    limit = np.uint64(size)
    outside = (lengths > limit) | (offsets > limit - np.minimum(lengths, limit))
    if outside.any():
        row = int(outside.argmax())
        raise BackendFailed(
            f"run {row} ({int(lengths[row])} bytes at offset {int(offsets[row])}) lies outside "
            f"the {whose}'s {size} bytes"
        )


class PreparedRun:
    """Moves a transfer once when called. One thread at a time.

    What it holds is given back when it is forgotten.
    """

    def __init__(
        self,
        work: str,
        parts: Sequence[ctypes.Structure],
        describe: Callable[[OSError], str],
        release: Callable[[], None] = lambda: None,
    ) -> None:
        """Start the threads.

        Args:
            work: Name of the C function that moves one part.
            parts: Its arguments, one for each thread.
            describe: Says of an error what was attempted, with whom, and what to try.
            release: Gives back what the parts point to, after the threads have ended.
        """
        loops = library()
        pointers = (ctypes.c_void_p * len(parts))(*map(ctypes.addressof, parts))
        function = ctypes.cast(getattr(loops, work), ctypes.c_void_p)
        team = loops.limits_team(function, pointers, len(parts))
        if not team:
            code = ctypes.get_errno()
            release()
            raise BackendFailed(f"cannot start {len(parts) - 1} threads: {os.strerror(code)}")
        self._team, self._many, self._describe = team, loops.limits_many, describe
        self._second = np.empty(1)
        self._second_at = address_of(self._second)
        self.close = weakref.finalize(self, _end, loops, team, parts, release)

    def __call__(self) -> float:
        """Move the bytes once; the seconds, taken in C. Raises `BackendFailed`."""
        self._run(1, self._second_at)
        return float(self._second[0])

    def _run(self, runs: int, seconds: int) -> None:
        """Move the bytes so often; C writes the seconds of each to that address."""
        if code := self._many(self._team, runs, seconds):
            error = OSError(-code, os.strerror(-code))
            raise BackendFailed(self._describe(error)) from error


class PreparedRuns(PreparedRun):
    """The same, also many times without Python in between."""

    def many(self, runs: int) -> NDArray[np.float64]:
        """Move the bytes `runs` times; the seconds of each, taken in C. Raises `BackendFailed`."""
        seconds = np.empty(runs)
        self._run(runs, address_of(seconds))
        return seconds


def _end(
    loops: ctypes.CDLL, team: int, parts: Sequence[ctypes.Structure], release: Callable[[], None]
) -> None:
    loops.limits_disband(team)
    del parts  # until here its threads used them
    release()
