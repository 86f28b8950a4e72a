"""A batch's arrays -> merged runs -> slices. No Python runs per descriptor.

A loop over 2048 descriptors would take longer than moving them over shared memory does: C merges
them, or numpy where it was not built. Up to `FEW` it is the other way round (`_merge_few`).
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mooncake_engine import native
from mooncake_engine.errors import InvalidTransfer
from mooncake_engine.iovec import address_of
from mooncake_engine.memory import FEW
from mooncake_engine.types import Op, Slice, uint64s

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike

    from mooncake_engine.types import Uint64s

#: Linux's UIO_MAXIOV: one sendmsg, recvmsg or process_vm_readv takes no more runs.
MAX_RUNS = 1024
#: A batch is not cut finer than this to occupy more lanes: waking a second thread costs about
#: 50 us on a virtual machine, copying 1 MiB about 200.
MIN_SHARE = 1 << 20
#: A lane's share beyond this comes in several slices, as far as the link's limit lets it: a lane
#: whose core is busy with something else then takes fewer of them.
FINE_BYTES = 8 << 20
SLICES_PER_LANE = 4
#: So many are merged with the interpreter lock held: 0.1 ms, where to give it up may cost 5.
_HELD_RUNS = 8192


class Runs(NamedTuple):
    """Row i moves `lengths[i]` > 0 bytes between `local[i]` and `remote[i]`; uint64, own memory."""

    local: Uint64s
    remote: Uint64s
    lengths: Uint64s


class Plan(NamedTuple):
    """All of a transfer that can be worked out before it starts; shared by its batches.

    Attributes:
        op: Which way.
        runs: After merging.
        slices: What lanes take.
        nbytes: Of all of them.
        descriptors: Runs as submitted.
    """

    op: Op
    runs: Runs
    slices: Sequence[Slice]
    nbytes: int
    descriptors: int


def descriptors(
    local: ArrayLike | Sequence[tuple[int, int, int]],
    remote: ArrayLike | None,
    lengths: ArrayLike | None,
) -> Runs:
    """What a caller handed to submit, as three equally long uint64 arrays.

    Either three arrays, or one sequence of (local address, remote address, length) tuples.

    Raises:
        InvalidTransfer: Not integers, negative, not equally long, or a length of zero.
    """
    try:
        if remote is None and lengths is None:
            table = np.array(local, np.uint64) if len(local) else np.empty((0, 3), np.uint64)  # type: ignore[arg-type]  # len() of a scalar raises TypeError, told below
            if table.ndim != 2 or table.shape[1] != 3:
                raise ValueError(f"expected (local, remote, length) tuples, got {table.shape}")
            runs = Runs(*(np.ascontiguousarray(column) for column in table.T))
        elif remote is None or lengths is None:
            raise TypeError("give local, remote and lengths, or one list of tuples")
        else:
            runs = Runs(uint64s(local), uint64s(remote), uint64s(lengths))
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidTransfer(f"cannot read the arrays of this transfer: {error}") from error
    if not runs.local.size == runs.remote.size == runs.lengths.size:
        raise InvalidTransfer(
            f"local, remote and lengths must be equally long, got {runs.local.size}, "
            f"{runs.remote.size} and {runs.lengths.size}"
        )
    few = runs.lengths.size <= FEW  # then a list says it in 0.1 us, numpy in 1.5
    if 0 in runs.lengths.tolist() if few else not runs.lengths.all():
        bad = int(np.argmin(runs.lengths))
        raise InvalidTransfer(f"run {bad} of {runs.lengths.size} has length 0; leave it out")
    return runs


def merge(op: Op, given: Runs) -> Runs:
    """Join neighbours that touch on both sides; many runs are ordered by destination, too.

    The remote side must be bounds-checked already, so that no length is absurd and no sum of
    them wraps. The result never aliases `given`: the
    caller may reuse its arrays.

    Raises:
        InvalidTransfer: Two runs write the same destination byte (sources may overlap).
    """
    few = given.lengths.size <= FEW
    runs = _merge_few(op, given) if few else _merge_in_c(op, given)
    return _merge_in_numpy(op, given) if runs is None else runs


def _merge_in_c(op: Op, given: Runs) -> Runs | None:
    """None: there is no library, or some overlap, and numpy's way says which."""
    library = native.available()
    if library is None:
        return None
    count = given.lengths.size
    destinations, sources = given[:2] if op is Op.READ else given[1::-1]
    into, out, lengths = np.empty((3, count), np.uint64)
    merge = library.holding.merge if count <= _HELD_RUNS else library.merge
    arrays = destinations, sources, given.lengths
    made = merge(*map(address_of, arrays), count, *map(address_of, (into, out, lengths)))
    if not made:
        return None
    into, out, lengths = into[:made], out[:made], lengths[:made]
    return Runs(into, out, lengths) if op is Op.READ else Runs(out, into, lengths)


def _merge_in_numpy(op: Op, given: Runs) -> Runs:
    destination = given.local if op is Op.READ else given.remote
    local, remote, lengths = given
    if destination.size > 1 and not bool((destination[1:] >= destination[:-1]).all()):
        order = np.argsort(destination, kind="stable")
        local, remote, lengths = local[order], remote[order], lengths[order]
        destination = destination[order]
    overlapping = destination[:-1] + lengths[:-1] > destination[1:]
    if overlapping.any():
        first = int(np.argmax(overlapping))
        raise InvalidTransfer(
            f"two runs of this {op} overlap in their destination: {int(lengths[first])} bytes at "
            f"{int(destination[first]):#x} reach into the run at {int(destination[first + 1]):#x}"
        )
    apart = np.empty(local.size, bool)
    apart[:1] = True
    apart[1:] = (local[:-1] + lengths[:-1] != local[1:]) | (
        remote[:-1] + lengths[:-1] != remote[1:]
    )
    if apart.all():
        return Runs(local.copy(), remote.copy(), lengths.copy())
    firsts = np.flatnonzero(apart)
    return Runs(local[firsts], remote[firsts], np.add.reduceat(lengths, firsts))


def _merge_few(op: Op, given: Runs) -> Runs | None:
    """`merge` of a few runs in plain ints; None: some overlap, and numpy's way says which.

    Where none can be joined the order stays: nobody needs it but the search for neighbours.
    """
    if given.lengths.size > 1:
        destinations, sources = given[:2] if op is Op.READ else given[1::-1]
        joined: list[list[int]] = []
        written = read = -1
        for destination, source, length in sorted(
            zip(destinations.tolist(), sources.tolist(), given.lengths.tolist(), strict=True)
        ):
            if destination < written:
                return None
            if destination == written and source == read:
                joined[-1][2] += length
            else:
                joined.append([destination, source, length])
            written, read = destination + length, source + length
        if len(joined) < given.lengths.size:
            into, out, lengths = np.ascontiguousarray(np.array(joined, np.uint64).T)
            return Runs(into, out, lengths) if op is Op.READ else Runs(out, into, lengths)
    return Runs(given.local.copy(), given.remote.copy(), given.lengths.copy())


def cut(
    op: Op,
    runs: Runs,
    grant: bytes,
    slice_bytes: int,
    slice_runs: int = MAX_RUNS,
    lanes: int = 1,
) -> list[Slice]:
    """Cut merged runs into slices of at most `slice_bytes` and `slice_runs`, in order.

    A batch that fits fewer slices than there are lanes is cut finer, down to `MIN_SHARE`.
    """
    local, remote, lengths = runs
    if not lengths.size:
        return []
    nbytes = total(lengths)
    share = nbytes
    if lanes > 1:
        share = -(-nbytes // lanes)
        share = max(MIN_SHARE, min(share, FINE_BYTES), share // SLICES_PER_LANE)
    if lengths.size <= slice_runs and nbytes <= min(slice_bytes, share):
        return [Slice(op, *runs, nbytes, grant)]
    ends = np.cumsum(lengths)
    size = np.uint64(min(slice_bytes, share))
    starts = ends - lengths
    cell = starts // size  # the run's bytes, laid end to end, on a grid of slices
    pieces = ((ends - np.uint64(1)) // size - cell).astype(np.int64) + 1
    if pieces.max() > 1:
        row = np.repeat(np.arange(lengths.size), pieces)
        nth = np.arange(row.size) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        cell = cell[row] + nth.astype(np.uint64)
        begin = np.maximum(starts[row], cell * size)
        skipped = begin - starts[row]
        lengths = np.minimum(ends[row], (cell + np.uint64(1)) * size) - begin
        local, remote = local[row] + skipped, remote[row] + skipped
    borders = [0, *(np.flatnonzero(cell[1:] != cell[:-1]) + 1).tolist(), int(cell.size)]
    return [
        _slice(op, Runs(local[i:j], remote[i:j], lengths[i:j]), grant)
        for first, last in itertools.pairwise(borders)
        for i in range(first, last, slice_runs)
        for j in (min(i + slice_runs, last),)
    ]


def total(lengths: Uint64s) -> int:
    """Bytes of all runs."""
    return sum(lengths.tolist()) if lengths.size <= FEW else int(lengths.sum())


def _slice(op: Op, runs: Runs, grant: bytes) -> Slice:
    return Slice(op, *runs, int(runs.lengths.sum()), grant)
