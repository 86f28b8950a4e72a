"""An engine slice -> work requests, with the rows of both sides' keys. Pure numpy.

A request is one contiguous range of the peer's memory, at most `slice_bytes` long, and up to
`max_sge` pieces of ours. So runs that touch on the peer's side share a request (READ scatters,
WRITE gathers), and no request reaches over the border of two registrations there; on our side
such a border only begins another piece. 1024 scattered runs take about 100 us here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from mooncake_engine.transport.rdma.verbs.base import Work

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mooncake_engine.transport.rdma.keys import KeyTable
    from mooncake_engine.types import Slice, Uint64s

    Int64s = NDArray[np.int64]

_ONE = np.uint64(1)
_Integer = TypeVar("_Integer", np.uint64, np.int64)


class Unregistered(LookupError):
    """A run lies in no registered memory, or not wholly."""

    def __init__(self, side: str, address: int, length: int) -> None:
        """Args: side: "local" or "remote"; address, length: of the first such run."""
        super().__init__(f"{length} bytes at {address:#x} ({side}) lie in no registered memory")
        self.side = side
        self.address = address
        self.length = length


class Cut(NamedTuple):
    """`n` work requests of `m` pieces.

    Attributes:
        work: What to post.
        nbytes: Bytes of each request, shape (n,).
        local_rows: Row in our key table of each piece, shape (m,).
        remote_rows: Row in the peer's key table of each request, shape (n,).
    """

    work: Work
    nbytes: Uint64s
    local_rows: Int64s
    remote_rows: Int64s

    def dealt(self, ways: int) -> Cut:
        """The same requests, so that each of `ways` equal shares has every `ways`-th of ours."""
        count = self.nbytes.size
        order = np.concatenate([np.arange(first, count, ways) for first in range(ways)])
        work, counts = self.work, self.work.sge_count[order]
        firsts = np.cumsum(counts) - counts
        piece = np.arange(work.local.size) + np.repeat(work.sge_first[order] - firsts, counts)
        return Cut(
            Work(work.remote[order], firsts, counts, work.local[piece], work.local_length[piece]),
            self.nbytes[order],
            self.local_rows[piece],
            self.remote_rows[order],
        )


def cut(
    piece: Slice,
    local: KeyTable,
    remote: KeyTable,
    *,
    slice_bytes: int,
    fragment_ratio: int,
    max_sge: int,
) -> Cut:
    """Cut a slice to work requests, in its order.

    Args:
        piece: At least one run.
        local: Our registrations.
        remote: The peer's.
        slice_bytes: Most bytes of a request, but for the last one of a range:
        fragment_ratio: a tail of less than slice_bytes / fragment_ratio joins the one before.
        max_sge: Most pieces of a request; of a READ often fewer than of a WRITE.

    Raises:
        Unregistered: A run lies in no registered memory of either side.
    """
    # All runs of the slice, laid end to end: a position is a byte's place in that row of bytes.
    lengths = piece.lengths
    behind = np.cumsum(lengths)
    starts, end = behind - lengths, behind[-1]
    ours = _rows(local, "local", piece.local, lengths)
    theirs = _rows(remote, "remote", piece.remote, lengths)
    apart = np.empty(lengths.size, np.bool_)  # runs that begin another range of the peer's
    apart[0] = True
    np.not_equal(piece.remote[:-1] + lengths[:-1], piece.remote[1:], out=apart[1:])
    apart[1:] |= theirs.last[:-1] != theirs.first[1:]

    ranges = _merged(starts[apart], _seams(remote, theirs, piece.remote, starts))
    requests = _slices(ranges, end, slice_bytes, fragment_ratio)
    # Often every run begins a request.
    begin = requests if bool(apart.all()) else _merged(starts, requests)
    pieces = _merged(begin, _seams(local, ours, piece.local, starts))
    first = _in_groups(pieces, requests, max_sge)

    run = np.searchsorted(starts, pieces, side="right") - 1
    skipped = pieces - starts[run]
    work = Work(
        remote=(piece.remote[run] + skipped)[first],
        sge_first=first,
        sge_count=_until_next(first, pieces.size),
        local=piece.local[run] + skipped,
        local_length=_until_next(pieces, end).astype(np.uint32),
    )
    return Cut(
        work,
        _until_next(pieces[first], end),
        local.locate(work.local),
        remote.locate(work.remote),
    )


class _Rows(NamedTuple):
    """The rows of each run's first and last byte."""

    first: Int64s
    last: Int64s


def _rows(table: KeyTable, side: str, addresses: Uint64s, lengths: Uint64s) -> _Rows:
    """Raises `Unregistered`."""
    first = table.locate(addresses)
    if int(first.min()) >= 0 and bool((lengths <= table.ends[first] - addresses).all()):
        return _Rows(first, first)
    rows = _Rows(first, table.locate(addresses + (lengths - _ONE)))
    # Rows touch, or there is a gap between them: no run may have one inside.
    gaps = np.concatenate(([0], np.cumsum(table.ends[:-1] != table.starts[1:])))
    bad = (rows.first < 0) | (rows.last < rows.first) | (gaps[rows.first] != gaps[rows.last])
    if bad.any():
        i = int(np.argmax(bad))
        raise Unregistered(side, int(addresses[i]), int(lengths[i]))
    return rows


def _seams(table: KeyTable, rows: _Rows, addresses: Uint64s, starts: Uint64s) -> Uint64s:
    """Positions inside runs where another registration begins."""
    if rows.last is rows.first:
        return starts[:0]
    counts = rows.last - rows.first
    run = np.repeat(np.arange(counts.size), counts)
    row = rows.first[run] + 1 + _nth(counts)
    seams: Uint64s = starts[run] + (table.starts[row] - addresses[run])
    return seams


def _slices(ranges: Uint64s, end: np.uint64, slice_bytes: int, fragment_ratio: int) -> Uint64s:
    """Where requests begin, so that each is short enough and no last one a crumb."""
    lengths = _until_next(ranges, end)
    size = np.uint64(slice_bytes)
    if lengths.max() <= size:
        return ranges
    counts = (lengths - _ONE) // size + _ONE
    tails = lengths - (counts - _ONE) * size
    counts -= (counts > _ONE) & (tails * np.uint64(fragment_ratio) < size)
    repeats = counts.astype(np.int64)
    return np.repeat(ranges, repeats) + _nth(repeats).astype(np.uint64) * size


def _in_groups(pieces: Uint64s, requests: Uint64s, most: int) -> Int64s:
    """Index of each request's first piece; a request of more than `most` becomes several."""
    first = np.searchsorted(pieces, requests).astype(np.int64)
    counts = _until_next(first, pieces.size)
    if counts.max() <= most:
        return first
    groups = (counts + (most - 1)) // most
    request = np.repeat(np.arange(groups.size), groups)
    return first[request] + counts[request] * _nth(groups) // groups[request]


def _until_next(places: NDArray[_Integer], end: _Integer | int) -> NDArray[_Integer]:
    """From each place to the next one, and from the last to `end`."""
    result = np.empty_like(places)
    np.subtract(places[1:], places[:-1], out=result[:-1])
    result[-1] = end - places[-1]
    return result


def _nth(counts: Int64s) -> Int64s:
    """0, 1, .. counts[0] - 1, 0, 1, .. counts[1] - 1, and so on."""
    behind = np.cumsum(counts)
    return np.arange(behind[-1]) - np.repeat(behind - counts, counts)


def _merged(positions: Uint64s, *more: Uint64s) -> Uint64s:
    """All of them, sorted, each once; `positions` is that already."""
    others = [array for array in more if array.size]
    if not others:
        return positions
    merged = np.sort(np.concatenate([positions, *others]), kind="stable")  # it merges sorted runs
    return merged[np.concatenate(([True], merged[1:] != merged[:-1]))]
