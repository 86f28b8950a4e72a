from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from mooncake_engine.errors import ConfigError
from mooncake_engine.topology import (
    HostPair,
    Measured,
    RailTable,
    dump_rails,
    host_of,
    load_rails,
    matchings,
)

if TYPE_CHECKING:
    from pathlib import Path

#: From the tuning guide's section on NUMA binding, as it stands.
GUIDE = """{
    "partition_matchings": {
        "0-0": [
            {
                "src_dev": "mlx5_bond_4",
                "dst_dev": "mlx5_bond_3",
                "src_numa": 0,
                "dst_numa": 0,
                "bandwidth": 21926.19,
                "latency": 7.95
            }
        ],
        "0-1": [
            {
                "src_dev": "mlx5_bond_4",
                "dst_dev": "mlx5_bond_7",
                "src_numa": 0,
                "dst_numa": 1,
                "bandwidth": 21931.28,
                "latency": 5.65
            }
        ]
    }
}"""


def load(tmp_path: Path, content: object) -> RailTable:
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "rail_topo.json").write_text(text)
    return load_rails(tmp_path / "rail_topo.json")


def pair(ours: str, theirs: str, bandwidth: float = 1000.0, latency: float = 5.0) -> Measured:
    return Measured(ours, theirs, 0, 0, bandwidth, latency)


def test_the_guides_file_is_read_as_it_stands(tmp_path: Path) -> None:
    table = load(tmp_path, GUIDE)
    assert table.best(0, 0) == (("mlx5_bond_4", "mlx5_bond_3"),)
    assert table.best(0, 1) == (("mlx5_bond_4", "mlx5_bond_7"),)
    assert table.best(1, 0) == ()


def test_a_list_of_host_pairs_prefers_what_was_measured_with_that_peer(tmp_path: Path) -> None:
    def record(host: str, theirs: str) -> dict[str, Any]:
        found = [{"src_dev": "mlx5_0", "dst_dev": theirs}]
        return {"src_host": "a", "dst_host": host, "partition_matchings": {"0-0": found}}

    table = load(tmp_path, [record("b", "mlx5_1"), record("c", "mlx5_2")])
    assert table.best(0, 0, "c") == (("mlx5_0", "mlx5_2"),)
    assert table.best(0, 0, "unheard-of") == (("mlx5_0", "mlx5_1"), ("mlx5_0", "mlx5_2"))


def test_pairs_come_best_first_and_extra_ones_last() -> None:
    table = RailTable(
        [
            HostPair(
                partition_matchings={
                    "0-0_extra": (pair("c", "x", bandwidth=9000),),
                    "0-0": (pair("a", "x", bandwidth=1000), pair("b", "y", bandwidth=2000)),
                }
            )
        ]
    )
    assert table.best(0, 0) == (("b", "y"), ("a", "x"), ("c", "x"))


def test_memory_of_no_known_node_takes_the_pairs_of_all() -> None:
    table = RailTable(
        [HostPair(partition_matchings={"0-1": (pair("a", "x"),), "1--1": (pair("b", "y"),)})]
    )
    assert table.best() == (("a", "x"), ("b", "y"))
    assert table.best(local_numa=0) == (("a", "x"),)
    assert table.best(remote_numa=0) == (("b", "y"),)
    assert table.best(1, 3) == (("b", "y"),)


def test_what_tents_own_rail_file_holds_is_read_too(tmp_path: Path) -> None:
    works = [{"local": "mlx5_0", "remote": f"mlx5_{n}"} for n in (1, 2)]
    direct = [{"local": "mlx5_1", "remote": "mlx5_0"}, {"local": "mlx5_0", "remote": "mlx5_1"}]
    table = load(tmp_path, {"all": works, "direct": direct})
    assert table.best(1, 0) == (("mlx5_1", "mlx5_0"), ("mlx5_0", "mlx5_1"))
    table = load(tmp_path, {"all": works})
    assert table.best(1, 0) == (("mlx5_0", "mlx5_1"), ("mlx5_0", "mlx5_2"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot be used"),
        ("[]", "holds no partition_matchings"),
        ({}, "holds no partition_matchings"),
        ({"partition_matchings": {"0-0": []}}, "holds no partition_matchings"),
        ({"partition_matchings": {"0": []}}, "has a partition '0'; expected two NUMA nodes"),
        ({"partition_matchings": {"0-0": [{"src_dev": "a"}]}}, "missing required field `dst_dev`"),
        ({"partition_matchings": {"0-0": [{"src_dev": "", "dst_dev": "b"}]}}, "length >= 1"),
        ("[1]", "cannot be used: Expected `object`"),
    ],
)
def test_a_file_without_pairs_is_refused(content: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        load(tmp_path, content)
    assert "rail_topo.json" in str(refused.value)


def test_a_file_that_is_not_there_is_named_with_what_writes_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*x\.json: No such file.*--measure PEER"):
        load_rails(tmp_path / "x.json")


def test_measuring_a_second_peer_keeps_the_first_and_again_replaces_it(tmp_path: Path) -> None:
    file = tmp_path / "rails.json"
    first = HostPair("a", "b", (), {"0-0": (pair("x", "y"),)})
    second = HostPair("a", "c", (), {"0-0": (pair("x", "z"),)})
    again = HostPair("a", "b", (), {"0-0": (pair("x", "w"),)})
    for record in (first, second, again):
        dump_rails(file, record)
    assert load_rails(file).records == (second, again)
    assert [entry.name for entry in tmp_path.iterdir()] == ["rails.json"]


def test_a_file_that_holds_something_else_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "precious.json").write_text('["precious"]')
    with pytest.raises(ConfigError, match=r"precious\.json cannot be used"):
        dump_rails(tmp_path / "precious.json", HostPair("a", "b"))
    assert (tmp_path / "precious.json").read_text() == '["precious"]'
    with pytest.raises(ConfigError, match="cannot write the rail topology"):
        dump_rails(tmp_path / "nowhere" / "rails.json", HostPair("a", "b"))


@pytest.mark.parametrize(
    ("segment", "host"),
    [
        ("10.0.0.2:15000", "10.0.0.2"),
        ("[fe80::1]:15000", "fe80::1"),
        ("node-7-812-1f0e2a3b", "node-7"),
        ("prefill", "prefill"),
    ],
)
def test_the_host_of_a_segment_is_in_its_name(segment: str, host: str) -> None:
    assert host_of(segment) == host


def test_greed_does_not_choose_the_pairs() -> None:
    found = matchings(
        [pair("a", "x", 100), pair("a", "y", 99), pair("b", "x", 99), pair("b", "y", 10)]
    )
    assert found == {"0-0": (pair("a", "y", 99), pair("b", "x", 99))}


def test_partitions_are_by_the_nodes_of_both_sides() -> None:
    near, far = Measured("a", "x", 0, 0, 10.0), Measured("a", "y", 0, 1, 10.0)
    assert matchings([far, near]) == {"0-0": (near,), "0-1": (far,)}


def test_nics_that_are_left_over_are_extra() -> None:
    pairs = [pair(ours, theirs) for ours in "abc" for theirs in "x"]
    found = matchings(pairs)
    assert len(found["0-0"]) == 1
    used = {p.src_dev for group in found.values() for p in group}
    assert used == set("abc")
    assert len(found["0-0_extra"]) == 2


def test_a_peer_with_more_nics_leaves_ours_one_each() -> None:
    found = matchings([pair("a", theirs, bandwidth=n + 1) for n, theirs in enumerate("xyz")])
    assert found == {"0-0": (pair("a", "z", bandwidth=3),)}
