from __future__ import annotations

import itertools
from typing import Any

import pytest
from route_rows import body, place, server

from mooncake_connector.errors import WireError
from mooncake_connector.sglang.routes import (
    RouteConflict,
    RouteTable,
    Row,
    decode_row,
    of_one_start,
)

#: Two each of all kinds of ranks: 16 of them.
EVERY_KIND = {"attn_tp_size": 2, "attn_cp_size": 2, "attn_dp_size": 2, "pp_size": 2}


def rows(bodies: list[dict[str, Any]]) -> list[Row]:
    return [decode_row(body) for body in bodies]


def table(bodies: list[dict[str, Any]]) -> RouteTable:
    filled = RouteTable()
    for row in rows(bodies):
        filled.add(row)
    return filled


def every_kind() -> list[dict[str, Any]]:
    return [
        body(
            rank,
            **EVERY_KIND,
            attn_dp_rank=dp,
            attn_cp_rank=cp,
            attn_tp_rank=tp,
            pp_rank=pp,
        )
        for rank, (dp, cp, tp, pp) in enumerate(itertools.product(range(2), repeat=4))
    ]


def test_the_topology_is_there_with_the_last_rank_and_not_before() -> None:
    filled = RouteTable()
    assert filled.missing() == "no prefill rank has registered yet"
    for number, row in enumerate(rows(every_kind())):
        assert filled.topology() is None
        assert number == 0 or f"{number} of 16 prefill ranks" in filled.missing()
        filled.add(row)
    topology = filled.topology()
    assert not filled.missing()
    assert topology is not None
    sizes = [topology[f"{kind}_size"] for kind in ("attn_tp", "attn_cp", "dp", "pp", "page")]
    assert sizes == [2, 2, 2, 2, 64]


def test_each_rank_is_found_at_its_place() -> None:
    filled = table(every_kind())
    for row, position in zip(every_kind(), itertools.product(range(2), repeat=4), strict=True):
        assert filled.rank(position) == place(row)
    assert filled.rank((0, 0, 2, 0)) is None


def test_the_groups_of_a_data_parallel_server_are_numbered_by_the_server() -> None:
    group = body(system_dp_size=2)
    filled = table([group, group | {"system_dp_rank": 1, "rank": 1}])
    topology = filled.topology()
    assert topology is not None
    assert topology["dp_size"] == 2
    assert filled.rank((1, 0, 0, 0)) is not None


def test_a_restarted_rank_counts_once_and_is_found_where_it_is_now() -> None:
    first, second = server(2)
    again = first | {"rank_port": 9999, "incarnation": "later"}
    filled = table([first, again])
    assert filled.topology() is None
    filled.add(decode_row(second))
    assert filled.topology() is not None
    assert filled.rank((0, 0, 0, 0)) == place(again)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("page_size", 16),
        ("kv_cache_dtype", "fp8_e5m2"),
        ("attn_tp_size", 4),
        ("pp_size", 2),
        ("kv_layout", "paged"),
        ("dsv41_spec_layout", {"block": 4}),
        ("decode_allocation_policy", "prefill_complete"),
        ("load_balance_method", "follow_bootstrap_room"),
    ],
)
def test_a_rank_that_contradicts_another_is_refused_with_both_values(
    name: str, value: object
) -> None:
    first, second = server(2)
    filled = table([first])
    with pytest.raises(RouteConflict) as refusal:
        filled.add(decode_row(second | {name: value}))
    assert f"{name} is {first[name]!r} in prefill rank 0" in str(refusal.value)
    assert f"and {value!r} in rank 1" in str(refusal.value)
    filled.add(decode_row(second))
    assert filled.topology() is not None


def test_a_rank_that_corrects_itself_is_not_its_own_contradiction() -> None:
    filled = table([body(page_size=16), body(page_size=64)])
    topology = filled.topology()
    assert topology is not None
    assert topology["page_size"] == 64


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4), (4, 2)])
def test_a_restart_on_another_number_of_ranks_replaces_all_old_ones(
    before: int, after: int
) -> None:
    filled = table(server(before))
    for row in rows(server(after, incarnation="later")):
        filled.add(row)
    topology = filled.topology()
    assert topology is not None
    assert topology["attn_tp_size"] == after
    for rank in range(max(before, after)):
        found = filled.rank((0, 0, rank, 0))
        assert (found is not None) == (rank < after)
        assert found is None or found["incarnation"] == "later"


def test_a_restarts_new_rank_waits_for_one_that_was_there_before() -> None:
    filled = table(server(1))
    known, added = rows(server(2, incarnation="later"))
    with pytest.raises(RouteConflict, match=r"attn_tp_size is 1 .* and 2"):
        filled.add(added)
    filled.add(known)
    filled.add(added)
    assert filled.topology() is not None


@pytest.mark.parametrize("keys", list(itertools.permutations(range(4))))
def test_what_an_earlier_start_left_in_the_store_does_not_hide_the_later_one(
    keys: tuple[int, ...],
) -> None:
    published = dict(enumerate(server(4))) | dict(enumerate(server(2, incarnation="later")))
    found, conflict = of_one_start(rows([published[key] for key in keys]))
    topology = found.topology()
    assert topology is not None
    assert topology["attn_tp_size"] == 2
    assert conflict == ""


def test_ranks_in_the_store_that_do_not_belong_together_are_said_to() -> None:
    first, second = server(2)
    found, conflict = of_one_start(rows([first, second | {"page_size": 16}]))
    assert found.missing() == "1 of 2 prefill ranks have registered"
    assert "page_size is 64 in prefill rank 0 (127.0.0.1) and 16 in rank 1" in conflict


def test_an_empty_store_has_no_ranks() -> None:
    found, conflict = of_one_start([])
    assert (len(found), conflict) == (0, "")


@pytest.mark.parametrize(
    ("name", "layout"), [("kv_layout", "paged"), ("dsv41_spec_layout", {"block": 4})]
)
def test_a_layout_is_named_where_there_is_one(name: str, layout: object) -> None:
    with_one, without = table([body(**{name: layout})]), table([body()])
    assert (with_one.topology() or {})[name] == layout
    assert name not in (without.topology() or {name})


@pytest.mark.parametrize("method", ["follow_bootstrap_room", "round_robin"])
def test_decode_is_told_whether_the_room_says_the_data_parallel_rank(method: str) -> None:
    topology = table([body(load_balance_method=method)]).topology()
    assert topology is not None
    assert topology["follow_bootstrap_room"] == (method == "follow_bootstrap_room")


def test_a_field_of_a_newer_sglang_is_ignored() -> None:
    assert decode_row(body() | {"colour": "red"}) == decode_row(body())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attn_tp_rank": 1}, "tensor-parallel rank 1 is not below the size 1"),
        ({"pp_rank": 3}, "pipeline rank 3 is not below the size 1"),
        ({"attn_cp_rank": 1}, "context-parallel rank 1"),
        ({"attn_dp_rank": 1}, "data-parallel rank 1"),
        ({"system_dp_size": 2, "system_dp_rank": 2}, "data-parallel rank 2"),
        ({"attn_tp_rank": -1}, "attn_tp_rank"),
        ({"attn_tp_size": 0}, "attn_tp_size"),
        ({"page_size": "many"}, "page_size"),
        ({"rank_port": 70000}, "rank_port"),
    ],
)
def test_a_row_that_cannot_be_is_refused_with_its_field(
    changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(WireError, match=f"not a prefill rank's registration: .*{reason}"):
        decode_row(body() | changes)


@pytest.mark.parametrize("name", ["incarnation", "engine_id", "rank", "attn_tp_size"])
def test_a_row_without_a_field_that_decode_needs_is_refused(name: str) -> None:
    row = body()
    del row[name]
    with pytest.raises(WireError, match=f"missing required field `{name}`"):
        decode_row(row)
