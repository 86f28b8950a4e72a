"""Work requests against the bytes that their slice names."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mooncake_engine import Op
from mooncake_engine.transport.rdma.keys import KeyRow, KeyTable
from mooncake_engine.transport.rdma.rails import Rail, share
from mooncake_engine.transport.rdma.work import Cut, Unregistered, cut
from mooncake_engine.types import Slice, uint64s

LOCAL, REMOTE = 1 << 40, 1 << 44
KIB = 1 << 10

Run = tuple[int, int, int]  # local address, remote address, length


def piece(runs: list[Run], op: Op = Op.READ) -> Slice:
    local, remote, lengths = (uint64s(column) for column in zip(*runs, strict=True))
    return Slice(op, local, remote, lengths, int(lengths.sum()), b"")


def table(*rows: tuple[int, int]) -> KeyTable:
    return KeyTable([KeyRow(address, length, (7,)) for address, length in rows])


OURS, THEIRS = table((LOCAL, 1 << 30)), table((REMOTE, 1 << 30))


def requests(made: Cut) -> list[tuple[int, list[tuple[int, int]]]]:
    """(remote address, [(local address, length), ...]) of each request."""
    work = made.work
    pieces = list(zip(work.local.tolist(), work.local_length.tolist(), strict=True))
    return [
        (remote, pieces[first : first + count])
        for remote, first, count in zip(
            work.remote.tolist(), work.sge_first.tolist(), work.sge_count.tolist(), strict=True
        )
    ]


class Case(NamedTuple):
    runs: list[Run]
    ours: KeyTable
    theirs: KeyTable
    slice_bytes: int
    fragment_ratio: int
    max_sge: int

    def cut(self) -> Cut:
        return cut(
            piece(self.runs),
            self.ours,
            self.theirs,
            slice_bytes=self.slice_bytes,
            fragment_ratio=self.fragment_ratio,
            max_sge=self.max_sge,
        )


@st.composite
def memory(draw: st.DrawFn, lengths: list[int], base: int) -> tuple[list[int], KeyTable]:
    """An address for each run, many of them touching, and registrations that cover them."""
    addresses, address = [], base
    for length in lengths:
        address += draw(st.sampled_from([0, 0, 0, 1, 50]))
        addresses.append(address)
        address += length
    seam = st.integers(base + 1, address) | st.sampled_from([*addresses[1:], address])
    seams = draw(st.lists(seam, max_size=4))
    borders = sorted({base, *seams, address + 1})
    return addresses, table(*((a, b - a) for a, b in itertools.pairwise(borders)))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    lengths = draw(st.lists(st.integers(1, 60), min_size=1, max_size=20))
    local, ours = draw(memory(lengths, LOCAL))
    remote, theirs = draw(memory(lengths, REMOTE))
    runs = list(zip(local, remote, lengths, strict=True))
    if draw(st.booleans()):
        runs = draw(st.permutations(runs))
    return Case(
        runs,
        ours,
        theirs,
        slice_bytes=draw(st.integers(1, 100)),
        fragment_ratio=draw(st.integers(1, 20)),
        max_sge=draw(st.integers(1, 5)),
    )


@given(cases())
def test_requests_move_each_byte_of_the_slice_in_its_order(case: Case) -> None:
    moved = []
    for remote, pieces in requests(case.cut()):
        for local, length in pieces:
            moved += [(local + i, remote + i) for i in range(length)]
            remote += length
    assert moved == [(local + i, remote + i) for local, remote, n in case.runs for i in range(n)]


@given(cases())
def test_no_request_is_larger_than_it_may_be(case: Case) -> None:
    made = case.cut()
    longest = case.slice_bytes + case.slice_bytes / case.fragment_ratio
    for (_, pieces), nbytes in zip(requests(made), made.nbytes.tolist(), strict=True):
        assert 1 <= len(pieces) <= case.max_sge
        assert all(length > 0 for _, length in pieces)
        assert sum(length for _, length in pieces) == nbytes < longest or nbytes <= case.slice_bytes


@given(cases())
def test_every_piece_and_request_lies_in_the_one_registration_that_it_names(case: Case) -> None:
    made = case.cut()
    sides = [
        (case.ours, made.local_rows, made.work.local, made.work.local_length.astype(np.uint64)),
        (case.theirs, made.remote_rows, made.work.remote, made.nbytes),
    ]
    for keys, rows, addresses, lengths in sides:
        assert rows.dtype == np.int64
        assert (keys.starts[rows] <= addresses).all()
        assert (addresses + lengths <= keys.ends[rows]).all()


@given(cases())
def test_neighbours_on_the_peers_side_are_in_one_request_unless_something_forbids_it(
    case: Case,
) -> None:
    made = case.cut()
    listed = requests(made)
    for i, ((remote, pieces), (following, more)) in enumerate(itertools.pairwise(listed)):
        size = int(made.nbytes[i])
        if remote + size != following or made.remote_rows[i] != made.remote_rows[i + 1]:
            continue
        fits = size + int(made.nbytes[i + 1]) <= case.slice_bytes
        assert not fits or len(pieces) + len(more) > case.max_sge


@given(cases(), st.integers(1, 6))
def test_requests_that_are_dealt_are_the_same_requests_in_turn(case: Case, ways: int) -> None:
    made = case.cut()
    dealt = made.dealt(ways)
    order = [i for way in range(ways) for i in range(way, made.nbytes.size, ways)]
    assert requests(dealt) == [requests(made)[i] for i in order]
    assert dealt.nbytes.tolist() == made.nbytes[order].tolist()
    assert dealt.remote_rows.tolist() == made.remote_rows[order].tolist()
    assert dealt.local_rows.tolist() == case.ours.locate(dealt.work.local).tolist()
    assert dealt.work.sge_first[0] == 0  # a chain's pieces lie in the order of its requests
    assert (np.diff(dealt.work.sge_first) == dealt.work.sge_count[:-1]).all()


def lengths_of(nbytes: int, slice_bytes: int, ratio: int) -> list[int]:
    runs = [(LOCAL, REMOTE, nbytes)]
    made = Case(runs, OURS, THEIRS, slice_bytes, ratio, max_sge=4).cut()
    return made.nbytes.tolist()


@pytest.mark.parametrize(
    ("nbytes", "ratio", "expected"),
    [
        (64 * KIB, 4, [64 * KIB]),
        (128 * KIB, 4, [64 * KIB, 64 * KIB]),
        (80 * KIB - 1, 4, [80 * KIB - 1]),  # 15.999 KiB is less than a quarter
        (80 * KIB, 4, [64 * KIB, 16 * KIB]),
        (128 * KIB - 1, 1, [128 * KIB - 1]),  # every tail is less than the whole
        (64 * KIB + 1, 65536, [64 * KIB, 1]),
        (32 * KIB, 4, [32 * KIB]),
    ],
)
def test_a_short_tail_joins_the_slice_before_it(
    nbytes: int, ratio: int, expected: list[int]
) -> None:
    assert lengths_of(nbytes, 64 * KIB, ratio) == expected


def test_a_long_run_is_cut_into_slices() -> None:
    assert lengths_of(8 << 20, 64 * KIB, 4) == [64 * KIB] * 128


@pytest.mark.parametrize("op", list(Op))
def test_pages_that_touch_on_the_peers_side_share_requests(op: Op) -> None:
    runs = [(LOCAL + i * 16 * KIB, REMOTE + i * 4 * KIB, 4 * KIB) for i in range(64)]
    made = cut(piece(runs, op), OURS, THEIRS, slice_bytes=64 * KIB, fragment_ratio=4, max_sge=4)
    assert made.nbytes.tolist() == [16 * KIB] * 16
    made = cut(piece(runs, op), OURS, THEIRS, slice_bytes=64 * KIB, fragment_ratio=4, max_sge=30)
    assert made.nbytes.tolist() == [64 * KIB] * 4


def test_entries_of_a_request_with_too_many_are_shared_evenly() -> None:
    runs = [(LOCAL + i * 16 * KIB, REMOTE + i * KIB, KIB) for i in range(10)]
    made = cut(piece(runs), OURS, THEIRS, slice_bytes=64 * KIB, fragment_ratio=4, max_sge=4)
    assert made.work.sge_count.tolist() == [3, 3, 4]


def test_a_request_ends_at_the_border_of_the_peers_registrations() -> None:
    theirs = table((REMOTE, 10), (REMOTE + 10, 5), (REMOTE + 15, 100))
    made = cut(
        piece([(LOCAL, REMOTE + 8, 20), (LOCAL + 50, REMOTE + 28, 2)]),
        OURS,
        theirs,
        slice_bytes=64,
        fragment_ratio=4,
        max_sge=4,
    )
    assert requests(made) == [
        (REMOTE + 8, [(LOCAL, 2)]),
        (REMOTE + 10, [(LOCAL + 2, 5)]),
        (REMOTE + 15, [(LOCAL + 7, 13), (LOCAL + 50, 2)]),
    ]
    assert made.remote_rows.tolist() == [0, 1, 2]


def test_a_border_of_our_registrations_begins_another_entry_only() -> None:
    ours = table((LOCAL, 10), (LOCAL + 10, 100))
    made = cut(
        piece([(LOCAL, REMOTE, 30)]), ours, THEIRS, slice_bytes=64, fragment_ratio=4, max_sge=4
    )
    assert requests(made) == [(REMOTE, [(LOCAL, 10), (LOCAL + 10, 20)])]
    assert made.local_rows.tolist() == [0, 1]


@given(cases(), st.data())
def test_the_first_run_outside_registered_memory_is_named(case: Case, data: st.DataObject) -> None:
    side = data.draw(st.sampled_from(["local", "remote"]))
    column = 0 if side == "local" else 1
    keys = case.ours if side == "local" else case.theirs
    lost = data.draw(st.integers(0, keys.starts.size - 1))
    rows = [
        (int(start), int(end - start))
        for i, (start, end) in enumerate(zip(keys.starts, keys.ends, strict=True))
        if i != lost
    ]
    begin, end = int(keys.starts[lost]), int(keys.ends[lost])
    hit = [run for run in case.runs if run[column] < end and begin < run[column] + run[2]]
    without = table(*rows)
    ours, theirs = (without, case.theirs) if side == "local" else (case.ours, without)
    if not hit:
        case._replace(ours=ours, theirs=theirs).cut()
        return
    with pytest.raises(Unregistered) as raised:
        case._replace(ours=ours, theirs=theirs).cut()
    assert (raised.value.side, raised.value.address) == (side, hit[0][column])
    assert raised.value.length == hit[0][2]
    assert f"{hit[0][2]} bytes at {hit[0][column]:#x}" in str(raised.value)


@given(st.integers(1, 100), st.integers(1, 9))
def test_the_share_of_a_rail_in_what_was_dealt_is_every_nth_request(count: int, ways: int) -> None:
    runs = [(LOCAL + i * KIB, REMOTE + 2 * i * KIB, i + 1) for i in range(count)]
    made = Case(runs, OURS, THEIRS, KIB, 4, max_sge=1).cut()
    shares = share(count, [Rail(i, i) for i in range(ways)], turn=0)
    dealt = made.dealt(len(shares))
    for way, (_, part) in enumerate(shares):
        assert dealt.nbytes[part].tolist() == made.nbytes[way :: len(shares)].tolist()
