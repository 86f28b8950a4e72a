from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from mooncake_engine.topology import Distance, Port, discover, distance
from sysfs_tree import SysfsTree, server

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def tree(tmp_path: Path) -> SysfsTree:
    return SysfsTree(tmp_path)


def test_the_server_has_8_nics_and_8_gpus_on_2_nodes(tmp_path: Path) -> None:
    machine = discover(server(tmp_path).root)
    assert [nic.name for nic in machine.nics] == [
        f"mlx5_bond_{n}" for n in (0, 1, 2, 3, 4, 5, 6, 8)
    ]
    assert [nic.numa for nic in machine.nics] == [1, 1, 1, 1, 0, 0, 0, 0]
    assert [gpu.index for gpu in machine.gpus] == list(range(8))
    assert [gpu.numa for gpu in machine.gpus] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [node.index for node in machine.nodes] == [0, 1]
    assert machine.nodes[0].cpus == {*range(32), *range(64, 96)}
    assert machine.nodes[1].distances == {0: 21, 1: 10}


def test_a_nic_tells_its_address_interface_and_port(tree: SysfsTree) -> None:
    tree.node(0, "0-3")
    tree.node(1, "4-7")
    tree.nic("mlx5_0", "pci0000:3a/0000:3a:00.0/0000:3b:00.0", 1, netdev="ens3f0np0")
    (nic,) = discover(tree.root).nics
    assert (nic.pci, nic.numa, nic.netdevs) == ("0000:3b:00.0", 1, ("ens3f0np0",))
    assert nic.path == ("pci0000:3a", "0000:3a:00.0", "0000:3b:00.0")
    assert nic.ports == (Port(1, "ACTIVE", "Ethernet", "200 Gb/sec (4X HDR)"),)


def test_a_machine_without_the_infiniband_folder_has_no_nics(tree: SysfsTree) -> None:
    tree.node(0, "0-1")
    assert discover(tree.root).nics == ()


def test_an_empty_sysfs_is_one_node_of_unknown_cpus(tmp_path: Path) -> None:
    machine = discover(tmp_path)
    assert (machine.nics, machine.gpus) == ((), ())
    assert [(node.index, node.cpus) for node in machine.nodes] == [(0, frozenset())]


def test_a_kernel_without_numa_has_one_node_of_all_cpus(tree: SysfsTree) -> None:
    tree.file("devices/system/cpu/online", "0-2,5")
    assert [(node.index, node.cpus) for node in discover(tree.root).nodes] == [(0, {0, 1, 2, 5})]


def test_this_machine_can_be_looked_at() -> None:
    assert discover().nodes


def test_soft_roce_on_a_virtual_interface_hangs_below_nothing(tree: SysfsTree) -> None:
    tree.node(0, "0-3")
    tree.node(1, "4-7")
    tree.soft("rxe0", "veth0")
    (nic,) = discover(tree.root).nics
    assert (nic.name, nic.pci, nic.numa, nic.path, nic.netdevs) == ("rxe0", "", -1, (), ("veth0",))
    assert nic.ports[0].state == "DOWN"


def test_soft_roce_on_a_real_interface_is_where_that_is(tree: SysfsTree) -> None:
    tree.node(0, "0-3")
    tree.node(1, "4-7")
    below = tree.function("pci0000:00/0000:00:1f.6", 1)
    tree.soft("rxe0", "eno1", below)
    (nic,) = discover(tree.root).nics
    assert (nic.pci, nic.numa, nic.netdevs) == ("0000:00:1f.6", 1, ("eno1",))


def test_node_minus_1_is_the_only_node_where_there_is_one(tree: SysfsTree) -> None:
    tree.node(0, "0-3")
    tree.nic("mlx5_0", "pci0000:00/0000:00:05.0", -1)
    tree.soft("rxe0", "veth0")
    assert [nic.numa for nic in discover(tree.root).nics] == [0, 0]


def test_node_minus_1_stays_unknown_where_there_are_two(tree: SysfsTree) -> None:
    tree.node(0, "0-1")
    tree.node(1, "2-3")
    tree.nic("mlx5_0", "pci0000:00/0000:00:05.0", -1)
    assert discover(tree.root).nics[0].numa == -1


def test_both_functions_of_a_nic_are_nics(tree: SysfsTree) -> None:
    tree.node(0, "0-3")
    for function in (0, 1):
        path = f"pci0000:3a/0000:3a:00.0/0000:3b:00.{function}"
        tree.nic(f"mlx5_{function}", path, 0, f"ens3f{function}")
    one, other = discover(tree.root).nics
    assert (one.pci, one.netdevs) == ("0000:3b:00.0", ("ens3f0",))
    assert (other.pci, other.netdevs) == ("0000:3b:00.1", ("ens3f1",))
    assert distance(one, other) is Distance.PIX


def test_a_sub_function_has_the_address_and_node_of_its_function(tree: SysfsTree) -> None:
    tree.node(0, "0-3")
    tree.node(1, "4-7")
    tree.nic("mlx5_2", "pci0000:3a/0000:3a:00.0/0000:3b:00.0", 1, below="mlx5_core.sf.4")
    (nic,) = discover(tree.root).nics
    assert (nic.pci, nic.numa) == ("0000:3b:00.0", 1)


def test_a_nic_that_was_pulled_out_is_left_out(tree: SysfsTree) -> None:
    tree.node(0, "0-3")
    tree.nic("mlx5_0", "pci0000:00/0000:00:05.0", 0)
    tree.link("class/infiniband/mlx5_1", "devices/pci0000:00/0000:00:06.0/infiniband/mlx5_1")
    assert [nic.name for nic in discover(tree.root).nics] == ["mlx5_0"]


def test_a_nic_whose_device_link_is_dead_is_there_at_an_unknown_place(tree: SysfsTree) -> None:
    tree.node(0, "0-1")
    tree.node(1, "2-3")
    tree.file("devices/gone/infiniband/mlx5_0/node_desc", "")
    tree.link("devices/gone/infiniband/mlx5_0/device", "devices/nowhere")
    tree.link("class/infiniband/mlx5_0", "devices/gone/infiniband/mlx5_0")
    (nic,) = discover(tree.root).nics
    assert (nic.pci, nic.numa, nic.path, nic.ports) == ("", -1, (), ())


def test_a_loop_of_links_is_no_device(tree: SysfsTree) -> None:
    tree.link("class/infiniband/mlx5_0", "class/infiniband/mlx5_1")
    tree.link("class/infiniband/mlx5_1", "class/infiniband/mlx5_0")
    assert discover(tree.root).nics == ()


def test_nics_are_ordered_by_number_not_by_letter(tree: SysfsTree) -> None:
    for number in (10, 2, 0):
        tree.nic(f"mlx5_{number}", f"pci0000:00/0000:00:{number:02x}.0", 0)
    assert [nic.name for nic in discover(tree.root).nics] == ["mlx5_0", "mlx5_2", "mlx5_10"]


def test_only_nvidias_display_and_3d_controllers_are_gpus(tree: SysfsTree) -> None:
    tree.gpu("pci0000:00/0000:00:02.0", 0, "0x030000")
    tree.gpu("pci0000:00/0000:00:01.0", 0, "0x030200")
    tree.gpu("pci0000:00/0000:00:02.1", 0, "0x040300")  # its sound
    tree.gpu("pci0000:00/0000:00:03.0", 0, "0x068000")  # an NVSwitch
    tree.function("pci0000:00/0000:00:04.0", 0, "0x1a03", "0x030000")  # the board's VGA
    assert [gpu.pci for gpu in discover(tree.root).gpus] == ["0000:00:01.0", "0000:00:02.0"]


def test_gpus_are_ordered_by_domain_before_bus(tree: SysfsTree) -> None:
    tree.gpu("pci10000:00/10000:01:00.0", 0)
    tree.gpu("pci0001:00/0001:02:00.0", 0)
    tree.gpu("pci0000:00/0000:f0:00.0", 0)
    found = [gpu.pci for gpu in discover(tree.root).gpus]
    assert found == ["0000:f0:00.0", "0001:02:00.0", "10000:01:00.0"]


def test_the_drivers_own_order_of_gpus_goes_before_ours(tree: SysfsTree) -> None:
    tree.gpu("pci0000:00/0000:1a:00.0", 0)
    tree.gpu("pci0000:00/0000:2b:00.0", 0)
    machine = discover(tree.root, cuda_order=["00000000:2B:00.0"])
    assert [(gpu.index, gpu.pci) for gpu in machine.gpus] == [(0, "0000:2b:00.0")]
    assert machine.gpus[0].path == ("pci0000:00", "0000:2b:00.0")


def test_a_gpu_of_the_driver_that_sysfs_lacks_is_at_an_unknown_place(tree: SysfsTree) -> None:
    (gpu,) = discover(tree.root, cuda_order=["0000:2B:00.0"]).gpus
    assert (gpu.index, gpu.pci, gpu.path) == (0, "0000:2b:00.0", ())
