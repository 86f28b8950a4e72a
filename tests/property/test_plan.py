"""The planner: every wanted byte exactly once, none else."""

from __future__ import annotations

import ctypes
import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mooncake_connector import plan
from mooncake_connector.layout import (
    CacheLayout,
    CacheSpec,
    GroupSpec,
    LayerLayout,
    PieceTable,
    layer_layout,
)

BLOCKS = 6  # pages per cache in these tests


@st.composite
def caches(draw: st.DrawFn) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Two caches of some layers: (blocks, heads, tokens, content) in one random physical order."""
    shape = (BLOCKS * draw(st.integers(1, 2)), draw(st.integers(1, 3)), 2, 4)
    order = draw(st.permutations(range(4)))
    layers = draw(st.integers(1, 3))

    def make() -> np.ndarray:
        return np.zeros([shape[axis] for axis in order], np.uint16).transpose(np.argsort(order))

    return [make() for _ in range(layers)], [make() for _ in range(layers)]


def table(layers: list[np.ndarray]) -> PieceTable:
    return PieceTable(
        [
            layer_layout(
                layer.__array_interface__["data"][0],
                layer.shape,
                [s // layer.itemsize for s in layer.strides],
                layer.itemsize,
                BLOCKS,
            )
            for layer in layers
        ]
    )


def copy(moves: plan.Transfers) -> None:
    for local, remote, length in zip(*moves, strict=True):
        ctypes.memmove(int(local), int(remote), int(length))


def pages_of(layer: np.ndarray) -> np.ndarray:
    """The layer by page: kernel blocks of one page side by side."""
    return layer.reshape(BLOCKS, -1)


@given(caches(), st.data())
def test_exactly_the_wanted_pages_arrive_in_any_physical_layout(
    pair: tuple[list[np.ndarray], list[np.ndarray]], data: st.DataObject
) -> None:
    source, destination = pair
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    for layer in source:
        layer[...] = rng.integers(1, 2**16, layer.shape)
    count = data.draw(st.integers(0, BLOCKS))
    theirs = rng.permutation(BLOCKS)[:count].astype(np.uint64)
    ours = rng.permutation(BLOCKS)[:count].astype(np.uint64)
    copy(plan.transfers(table(destination), table(source), ours, theirs))
    for own, layer in zip(destination, source, strict=True):
        expected = np.zeros_like(pages_of(layer))
        expected[ours.astype(int)] = pages_of(layer)[theirs.astype(int)]
        assert np.array_equal(pages_of(own), expected)


@given(caches(), st.lists(st.integers(0, BLOCKS - 1), unique=True))
def test_no_byte_is_written_twice(
    pair: tuple[list[np.ndarray], list[np.ndarray]], pages: list[int]
) -> None:
    source, _ = pair
    ids = np.array(pages, np.uint64)
    moves = plan.transfers(table(source), table(source), ids, ids)
    written = sorted(zip(moves.local.tolist(), moves.lengths.tolist(), strict=True))
    for (start, length), (following, _) in itertools.pairwise(written):
        assert start + length <= following
    assert moves.nbytes == len(pages) * sum(layer.nbytes // BLOCKS for layer in source)


def test_a_group_that_a_pipeline_stage_holds_no_layer_of_moves_nothing() -> None:
    pages = np.arange(3, dtype=np.uint64)
    assert plan.transfers(PieceTable([]), PieceTable([]), pages, pages) is plan.EMPTY


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), st.integers(0, 9))
def test_overlap_pairs_equal_positions(first: int, count: int, other: int, many: int) -> None:
    wanted = plan.PageRun(first, np.arange(count, dtype=np.uint64) + 100)
    offered = plan.PageRun(other, np.arange(many, dtype=np.uint64) + 500)
    ours, theirs = plan.overlap(wanted, offered)
    positions = set(range(first, first + count)) & set(range(other, other + many))
    assert {int(i) - 100 + first for i in ours} == positions
    assert [int(i) - 100 + first for i in ours] == [int(i) - 500 + other for i in theirs]


NAMES = [f"layer {number}" for number in range(6)]


@given(st.permutations(NAMES), st.lists(st.sampled_from(NAMES), unique=True), st.data())
def test_narrowed_finds_by_name_what_the_other_side_has(
    held: list[str], wanted: list[str], data: st.DataObject
) -> None:
    numbers = st.integers(1, 2**40)
    where = {
        name: LayerLayout(
            address=data.draw(numbers),
            page_stride=data.draw(numbers),
            piece_bytes=data.draw(numbers),
            piece_offsets=tuple(data.draw(st.lists(numbers, min_size=1, max_size=3))),
            pages=data.draw(numbers),
        )
        for name in held
    }
    layout = CacheLayout((tuple(where.values()), (where[held[0]],)))
    own, other = cache(held, held[:1]), cache(wanted, held[:1])
    table, only = plan.narrowed(layout, own, other)
    pieces = [
        (where[name].address + offset, where[name].page_stride, where[name].piece_bytes)
        for name in wanted
        for offset in where[name].piece_offsets
    ]
    assert rows(table) == pieces
    assert table.pages == min((where[name].pages for name in wanted), default=0)
    assert rows(only) == rows(PieceTable([where[held[0]]]))


@given(
    st.lists(st.sampled_from(NAMES), unique=True),
    st.lists(st.sampled_from(NAMES), unique=True),
    st.sampled_from([(1, 1), (2, 2), (1, 2), (2, 1), (3, 2)]),
)
def test_two_caches_without_a_difference_have_a_part_in_common_that_narrowed_names(
    theirs: list[str], ours: list[str], stages: tuple[int, int]
) -> None:
    """For layers of one size the model is: equal stages and lists, or a part of one stage's."""
    there, here = stages
    prefill, decode = cache(theirs, pp_size=there), cache(ours, pp_size=here)
    fits = set(theirs) <= set(ours) if here == 1 < there else (theirs, there) == (ours, here)
    assert (plan.differences(prefill, decode) == []) is fits
    if fits:
        layers = tuple(
            LayerLayout(address=n, page_stride=8, piece_bytes=8, piece_offsets=(0,), pages=BLOCKS)
            for n, _ in enumerate(ours)
        )
        (table,) = plan.narrowed(CacheLayout((layers,)), decode, prefill)
        assert [ours[int(address)] for address in table.base] == theirs


def cache(*groups: list[str], pp_size: int = 1) -> CacheSpec:
    return CacheSpec(
        model="",
        model_digest="",
        revision="",
        dtype="",
        page_size=1,
        order="",
        tp_rank=0,
        tp_size=1,
        pp_size=pp_size,
        groups=tuple(
            GroupSpec(kind="full", layers=tuple(names), page_bytes=(8,) * len(names))
            for names in groups
        ),
    )


def rows(table: PieceTable) -> list[tuple[int, int, int]]:
    return [
        (int(base), int(stride), int(nbytes))
        for base, stride, nbytes in zip(table.base, table.stride, table.nbytes, strict=True)
    ]
