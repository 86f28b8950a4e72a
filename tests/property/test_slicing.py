"""Slices of a batch move exactly the bytes that its descriptors name, each once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mooncake_engine import InvalidTransfer, Op
from mooncake_engine.slicing import (
    MAX_RUNS,
    MIN_SHARE,
    _merge_in_c,
    _merge_in_numpy,
    cut,
    descriptors,
    merge,
)
from native_loops import needs_native

if TYPE_CHECKING:
    from mooncake_engine.types import Slice

Row = tuple[int, int, int]


@st.composite
def disjoint(draw: st.DrawFn) -> list[Row]:
    """(destination, source, length) rows whose destinations do not overlap, in any order."""
    rows: list[Row] = []
    position = 1000
    for _ in range(draw(st.integers(0, 30))):
        length = draw(st.integers(1, 40))
        source = draw(
            st.integers(1, 5000)
            | st.sampled_from([rows[-1][1] + rows[-1][2] if rows else 1])  # often adjacent
        )
        rows.append((position, source, length))
        position += length + draw(st.sampled_from([0, 0, 0, 1, 7]))
    return draw(st.permutations(rows))


def pairs(rows: list[Row]) -> dict[int, int]:
    """Destination byte -> source byte."""
    return {to + i: source + i for to, source, length in rows for i in range(length)}


def flat(op: Op, slices: list[Slice]) -> list[Row]:
    rows = [
        row
        for piece in slices
        for row in zip(
            piece.local.tolist(), piece.remote.tolist(), piece.lengths.tolist(), strict=True
        )
    ]
    return rows if op is Op.READ else [(remote, local, length) for local, remote, length in rows]


def as_given(op: Op, rows: list[Row]) -> list[Row]:
    return rows if op is Op.READ else [(source, to, length) for to, source, length in rows]


@given(disjoint(), st.sampled_from(Op), st.integers(1, 100))
def test_slices_cover_every_byte_once_and_no_other(
    rows: list[Row], op: Op, slice_bytes: int
) -> None:
    runs = merge(op, descriptors(as_given(op, rows), None, None))
    slices = cut(op, runs, b"grant", slice_bytes)
    moved = flat(op, slices)
    assert pairs(moved) == pairs(rows)
    assert sum(length for _, _, length in moved) == sum(length for _, _, length in rows)
    for piece in slices:
        assert 0 < piece.nbytes == piece.lengths.sum() <= slice_bytes
        assert 0 < piece.lengths.size <= MAX_RUNS
        assert (piece.op, piece.grant) == (op, b"grant")
        assert all(a.flags.c_contiguous for a in (piece.local, piece.remote, piece.lengths))


@given(
    st.lists(
        st.tuples(st.integers(0, 40) | st.integers(0, 1 << 63), st.integers(0, 60)),
        min_size=1,
        max_size=40,
    ),
    st.integers(1, 9),
    st.sampled_from(Op),
)
def test_c_and_numpy_join_and_order_alike(
    places: list[tuple[int, int]], length: int, op: Op
) -> None:
    """Also where two runs overlap: then C leaves it to numpy to say which."""
    needs_native()
    rows = [(to * length, source * length, length) for to, source in places if to < 1 << 59]
    if not rows:
        return
    runs = descriptors(as_given(op, rows), None, None)
    found = _merge_in_c(op, runs)
    if found is None:
        with pytest.raises(InvalidTransfer, match="overlap in their destination"):
            _merge_in_numpy(op, runs)
        return
    for mine, other in zip(found, _merge_in_numpy(op, runs), strict=True):
        np.testing.assert_array_equal(mine, other)
        assert mine.flags.c_contiguous


@given(disjoint(), st.sampled_from(Op))
def test_merged_runs_have_no_neighbours_left(rows: list[Row], op: Op) -> None:
    runs = merge(op, descriptors(as_given(op, rows), None, None))
    ends = {(int(a + n), int(b + n)) for a, b, n in zip(*runs, strict=True)}
    starts = set(zip(runs.local.tolist(), runs.remote.tolist(), strict=True))
    assert not ends & starts


@given(disjoint(), st.data(), st.sampled_from(Op))
def test_overlapping_destinations_are_refused(rows: list[Row], data: st.DataObject, op: Op) -> None:
    rows = [*rows, (2_000_000, 1, 10)]
    to, _, length = data.draw(st.sampled_from(rows))
    inside = data.draw(st.integers(to, to + length - 1))
    bad = data.draw(st.permutations([*rows, (inside, 77, 1)]))
    with pytest.raises(InvalidTransfer, match="overlap in their destination"):
        merge(op, descriptors(as_given(op, bad), None, None))


@given(disjoint(), st.sampled_from(Op))
def test_later_changes_to_the_callers_arrays_have_no_effect(rows: list[Row], op: Op) -> None:
    columns = np.array(as_given(op, rows), np.uint64).reshape(-1, 3).T.copy()
    slices = cut(op, merge(op, descriptors(*columns)), b"", 64)
    columns[:] = 0
    assert pairs(flat(op, slices)) == pairs(rows)


@given(st.integers(1, 64 * MIN_SHARE), st.integers(1, 8))
def test_a_batch_is_shared_among_lanes_but_not_too_finely(nbytes: int, lanes: int) -> None:
    slice_bytes = 8 * MIN_SHARE
    runs = merge(Op.READ, descriptors([(1 << 40, 1 << 41, nbytes)], None, None))
    slices = cut(Op.READ, runs, b"", slice_bytes, lanes=lanes)
    assert sum(piece.nbytes for piece in slices) == nbytes
    assert all(MIN_SHARE <= piece.nbytes <= slice_bytes for piece in slices[:-1])
    assert len(slices) >= min(lanes, nbytes // MIN_SHARE)
