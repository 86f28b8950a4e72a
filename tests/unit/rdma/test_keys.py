"""The table of keys against a loop over its rows."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mooncake_engine.transport.rdma.keys import KeyRow, KeyTable
from mooncake_engine.types import uint64s

PAGE = 4096


@st.composite
def _rows(draw: st.DrawFn, devices: int) -> list[KeyRow]:
    """Disjoint rows in any order, some touching, also near the end of the address space."""
    address = draw(st.sampled_from([PAGE, 1 << 47, (1 << 64) - (1 << 40)]))
    rows = []
    for gap, length in draw(
        st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3 * PAGE)), max_size=12)
    ):
        address += gap * PAGE
        keys = draw(st.tuples(*[st.integers(0, (1 << 32) - 1)] * devices))
        rows.append(KeyRow(address, length, keys))
        address += length
    return draw(st.permutations(rows))


@given(st.data(), st.integers(1, 4))
def test_each_address_is_found_in_the_row_that_holds_it_or_in_none(
    data: st.DataObject, devices: int
) -> None:
    rows = data.draw(_rows(devices))
    table = KeyTable(rows, devices)
    edges = [row.address + step for row in rows for step in (-1, 0, row.length - 1, row.length)]
    addresses = uint64s(np.array([*edges, 0, (1 << 64) - 1], np.uint64))
    slots = table.locate(addresses)
    assert slots.dtype == np.int64
    for address, slot in zip(addresses.tolist(), slots.tolist(), strict=True):
        holder = [row for row in rows if row.address <= address < row.address + row.length]
        if not holder:
            assert slot == -1
            continue
        assert table.starts[slot] == holder[0].address
        assert table.ends[slot] == holder[0].address + holder[0].length
        assert tuple(table.keys[:, slot].tolist()) == holder[0].keys


def test_rows_sort_by_address_and_hold_a_key_for_each_device() -> None:
    table = KeyTable([KeyRow(9 * PAGE, PAGE, (3, 4)), KeyRow(PAGE, PAGE, (1, 2))])
    assert table.starts.tolist() == [PAGE, 9 * PAGE]
    assert table.keys.tolist() == [[1, 3], [2, 4]]
    assert table.keys.dtype == np.uint32
    assert table.keys.flags.c_contiguous
    assert len(table) == 2


def test_no_rows_are_a_table_that_holds_no_address() -> None:
    table = KeyTable([], devices=2)
    assert len(table) == 0
    assert table.keys.shape == (2, 0)
    assert table.locate(uint64s([0, PAGE])).tolist() == [-1, -1]
    assert KeyTable([]).locate(uint64s(np.array([], np.uint64))).tolist() == []


def test_a_row_travels_as_an_array() -> None:
    row = KeyRow(PAGE, 2 * PAGE, (7, 8))
    blob = msgspec.msgpack.encode(row)
    assert msgspec.msgpack.decode(blob) == [PAGE, 2 * PAGE, [7, 8]]
    assert msgspec.msgpack.decode(blob, type=KeyRow) == row


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([KeyRow(PAGE, 10, (1,)), KeyRow(PAGE + 9, 10, (1,))], "overlap"),
        ([KeyRow(PAGE, 10, (1, 2)), KeyRow(3 * PAGE, 10, (1,))], "1 keys for 2 devices"),
        ([KeyRow(PAGE, 0, (1,))], "no memory"),
        ([KeyRow(-PAGE, 10, (1,))], "no memory"),
        ([KeyRow((1 << 64) - 10, 10, (1,))], "no memory"),
        ([KeyRow(PAGE, 10, (1 << 32,))], "32 bits"),
        ([KeyRow(PAGE, 10, (-1,))], "32 bits"),
    ],
)
def test_rows_of_a_bad_peer_are_refused(rows: list[KeyRow], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        KeyTable(rows)
