from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from mooncake_engine.errors import ConfigError
from mooncake_engine.topology import (
    Distance,
    Gpu,
    Machine,
    Nic,
    Node,
    Priority,
    cpus_near,
    discover,
    distance,
    load_matrix,
    matrix,
    names_of,
    narrow,
    nics_for,
    to_json,
)
from sysfs_tree import BONDS, SysfsTree, server

if TYPE_CHECKING:
    from pathlib import Path


def bonds(*numbers: int) -> tuple[str, ...]:
    return tuple(f"mlx5_bond_{number}" for number in numbers)


def near(numa: int) -> Node:
    return Node(numa, frozenset({numa}), {numa: 10, 1 - numa: 21})


def test_memory_of_a_node_prefers_the_nics_of_that_node(tmp_path: Path) -> None:
    rows = matrix(discover(server(tmp_path).root))
    assert rows["cpu:0"] == Priority(bonds(4, 5, 6, 8), bonds(0, 1, 2, 3))
    assert rows["cpu:1"] == Priority(bonds(0, 1, 2, 3), bonds(4, 5, 6, 8))


def test_a_gpu_prefers_the_nic_behind_its_own_switch(tmp_path: Path) -> None:
    rows = matrix(discover(server(tmp_path).root))
    preferred = [rows[f"cuda:{index}"].preferred for index in range(8)]
    assert preferred == [bonds(number) for number in (*BONDS[0], *BONDS[1])]


def test_two_gpus_behind_one_switch_share_its_two_nics(tmp_path: Path) -> None:
    rows = matrix(discover(server(tmp_path, per_switch=2).root))
    assert rows["cuda:0"].preferred == rows["cuda:1"].preferred == bonds(4, 5)
    assert rows["cuda:6"].preferred == rows["cuda:7"].preferred == bonds(2, 3)


def test_a_gpu_without_a_nic_near_prefers_those_of_its_node(tmp_path: Path) -> None:
    machine = discover(server(tmp_path).root)
    assert matrix(machine, excluded=bonds(4))["cuda:0"].preferred == bonds(5, 6, 8)


def test_nics_to_fall_back_to_are_nearest_first(tmp_path: Path) -> None:
    rows = matrix(discover(server(tmp_path).root))
    assert rows["cuda:0"].available == bonds(5, 6, 8, 0, 1, 2, 3)
    assert rows["cuda:4"].available == bonds(1, 2, 3, 4, 5, 6, 8)


def test_a_gpu_whose_node_has_no_nic_prefers_all_alike(tmp_path: Path) -> None:
    machine = discover(server(tmp_path).root)
    assert matrix(machine, only=bonds(0, 1))["cuda:0"] == Priority(bonds(0, 1), ())


@pytest.mark.parametrize(
    ("gpu", "nic", "expected"),
    [
        ("pci0000:10/0000:10:01.0/0000:11:00.0", "pci0000:10/0000:10:01.0/0000:11:00.1", "PIX"),
        (
            "pci0000:10/0000:10:01.0/0000:11:00.0/0000:12:00.0/0000:13:00.0",
            "pci0000:10/0000:10:01.0/0000:11:00.0/0000:12:01.0/0000:14:00.0",
            "PIX",
        ),
        (  # a switch behind a switch
            "pci0000:10/0000:10:01.0/0000:11:00.0/0000:12:00.0/0000:13:00.0",
            "pci0000:10/0000:10:01.0/0000:11:00.0/0000:12:01.0/0000:14:00.0/0000:15:00.0/0000:16:00.0",
            "PXB",
        ),
        ("pci0000:10/0000:10:01.0/0000:11:00.0", "pci0000:10/0000:10:02.0/0000:21:00.0", "PHB"),
        ("pci0000:10/0000:10:01.0/0000:11:00.0", "pci0000:20/0000:20:01.0/0000:21:00.0", "NODE"),
        ("pci0000:10/0000:10:01.0/0000:11:00.0", "pci0000:90/0000:90:01.0/0000:91:00.0", "SYS"),
    ],
)
def test_distances_are_those_of_nvidia_smi(gpu: str, nic: str, expected: str) -> None:
    numa = 1 if "0000:90" in nic else 0
    one = Gpu(0, "", 0, tuple(gpu.split("/")))
    other = Nic("mlx5_0", "", numa, tuple(nic.split("/")))
    assert distance(one, other) is distance(other, one) is Distance[expected]


def test_unknown_nodes_are_not_one_node() -> None:
    one, other = Gpu(0, "", -1, ("pci0000:10",)), Nic("mlx5_0", "", -1, ("pci0000:20",))
    assert distance(one, other) is Distance.SYS


def test_soft_nics_are_far_from_gpus_but_serve_when_there_is_no_other(tmp_path: Path) -> None:
    tree = SysfsTree(tmp_path)
    tree.node(0, "0-3", "10 21")
    tree.node(1, "4-7", "21 10")
    tree.gpu("pci0000:10/0000:10:01.0/0000:11:00.0", 0)
    tree.soft("rxe0", "veth0")
    tree.soft("rxe1", "veth2")
    rows = matrix(discover(tmp_path))
    everything = Priority(("rxe0", "rxe1"), ())
    assert rows == {"cpu:0": everything, "cpu:1": everything, "cuda:0": everything}
    tree.nic("mlx5_0", "pci0000:10/0000:10:02.0/0000:21:00.0", 0)
    assert matrix(discover(tmp_path))["cuda:0"] == Priority(("mlx5_0",), ("rxe0", "rxe1"))


def test_one_nic_serves_all_memory() -> None:
    nic = Nic("mlx5_0", "0000:11:00.0", 1, ("pci0000:10", "0000:11:00.0"))
    rows = matrix(Machine((nic,), (Gpu(0, "", 0),), (near(0), near(1))))
    assert rows == dict.fromkeys(["cpu:0", "cpu:1", "cuda:0"], Priority(("mlx5_0",), ()))


def test_a_node_without_nics_prefers_those_of_the_nearest_node() -> None:
    """Four nodes, as two sockets show with sub-NUMA clustering; NICs on 0 and 2."""
    slit = {0: (10, 12, 32, 32), 1: (12, 10, 32, 32), 2: (32, 32, 10, 12), 3: (32, 32, 12, 10)}
    nodes = tuple(Node(n, frozenset({n}), dict(enumerate(row))) for n, row in slit.items())
    rows = matrix(Machine((Nic("mlx5_0", numa=0), Nic("mlx5_1", numa=2)), (), nodes))
    assert rows["cpu:1"] == Priority(("mlx5_0",), ("mlx5_1",))
    assert rows["cpu:3"] == Priority(("mlx5_1",), ("mlx5_0",))


def test_a_nic_of_an_unknown_node_is_preferred_by_every_node() -> None:
    machine = Machine((Nic("mlx5_0", numa=0), Nic("rxe0")), (), (near(0), near(1)))
    rows = matrix(machine)
    assert rows["cpu:0"] == rows["cpu:1"] == Priority(("mlx5_0", "rxe0"), ())


def test_a_nic_to_use_that_is_not_there_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    machine = discover(server(tmp_path).root)
    with pytest.raises(
        ConfigError, match=r"no RDMA device 'mlx5_bond_00'; did you mean mlx5_bond_0"
    ):
        matrix(machine, only=["mlx5_bond_00"])
    with pytest.raises(ConfigError, match=r"no RDMA device 'mlx5_0'; it has none"):
        matrix(Machine(nodes=(near(0),)), only=["mlx5_0"])


def test_a_machine_without_nics_has_rows_without_nics() -> None:
    rows = matrix(Machine(nodes=(near(0),)))
    assert rows == {"cpu:0": Priority((), ())}
    assert nics_for(rows, "cpu") == Priority((), ())


def test_memory_of_no_known_node_uses_the_nics_of_all_nodes() -> None:
    rows = {
        "cpu:0": Priority(("a",), ("b", "c")),
        "cpu:1": Priority(("b",), ("a", "c")),
        "cuda:0": Priority(("c",), ("a", "b")),
    }
    assert nics_for(rows, "cpu") == Priority(("a", "b"), ("c",))
    assert nics_for(rows, "cpu:1") == rows["cpu:1"]
    assert nics_for(rows, "cuda:7") == Priority(("a", "b", "c"), ())
    assert nics_for(rows | {"*": Priority(("c",), ("a",))}, "cuda:7") == Priority(("c",), ("a",))
    assert nics_for(rows | {"cpu": Priority(("c",), ())}, "cpu") == Priority(("c",), ())


def test_nics_to_fall_back_to_are_preferred_where_no_others_are_left() -> None:
    rows = narrow({"cuda:0": Priority(("a",), ("b", "c"))}, {"b", "c"})
    assert rows == {"cuda:0": Priority((), ("b", "c"))}
    assert names_of(rows) == ("b", "c")
    assert nics_for(rows, "cuda:0") == Priority(("b", "c"), ())


def test_json_is_mooncakes_and_comes_back(tmp_path: Path) -> None:
    rows = {"cpu:0": Priority(("mlx5_0",), ("mlx5_1",)), "cuda:0": Priority(("mlx5_1",), ())}
    text = to_json(rows)
    assert json.loads(text) == {"cpu:0": [["mlx5_0"], ["mlx5_1"]], "cuda:0": [["mlx5_1"], []]}
    (tmp_path / "topo.json").write_text(text)
    assert load_matrix(tmp_path / "topo.json") == load_matrix(text) == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"cpu:0": [["a"]]}', r"cannot be used at 'cpu:0': .*length 2, got 1; expected"),
        ('{"cpu:0": [["a"], [], []]}', r"cannot be used at 'cpu:0': .*length 2"),
        ('{"cpu:0": ["a", []]}', r"used at 'cpu:0': Expected `array`"),
        ('{"nics": [{"name": "mlx5_0"}], "mems": []}', r"cannot be used at 'nics'"),
        ('{"cpu:0": [["a"], ["b", "a"]]}', r"names a twice for cpu:0; leave one"),
        ('{"cpu:0": [[""], []]}', r"has an empty name for cpu:0"),
        ('{"socket 0": [["a"], []]}', r"has a row 'socket 0'; a memory location is cpu:0"),
        ('{"cpu:0": [[], []]}', r"names no NIC"),
        ("{}", r"names no NIC"),
        ('{"cpu:0": [["a"], []]', r"cannot be used"),
    ],
)
def test_a_matrix_that_cannot_be_used_says_why(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_matrix(text)
    (tmp_path / "topo.json").write_text(text)
    with pytest.raises(ConfigError, match=r"matrix in /.*topo\.json .*"):
        load_matrix(tmp_path / "topo.json")


def test_a_matrix_that_cannot_be_read_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*nowhere\.json: No such file"):
        load_matrix(str(tmp_path / "nowhere.json"))
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"bytes\.json: it is not UTF-8"):
        load_matrix(tmp_path / "bytes.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"list\.json cannot be used: Expected `object`"):
        load_matrix(tmp_path / "list.json")


def test_workers_of_a_nic_belong_on_its_nodes_cpus(tmp_path: Path) -> None:
    machine = discover(server(tmp_path).root)
    assert cpus_near(machine, "mlx5_bond_0") == {*range(32, 64), *range(96, 128)}
    assert cpus_near(machine, "mlx5_bond_4") == {*range(32), *range(64, 96)}


def test_no_cpus_are_near_a_nic_of_unknown_place_or_a_node_without_any() -> None:
    memory_alone = Node(1, frozenset(), {1: 10})
    machine = Machine((Nic("rxe0"), Nic("mlx5_0", numa=1)), (), (near(0), memory_alone))
    assert cpus_near(machine, "rxe0") is None
    assert cpus_near(machine, "mlx5_0") is None
    assert cpus_near(machine, "mlx5_9") is None
