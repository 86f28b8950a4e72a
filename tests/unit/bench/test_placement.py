from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING

import pytest
from mooncake_engine.topology import Machine, Nic, Node

from mooncake_connector.bench.placement import stay_near, touched_pages

if TYPE_CHECKING:
    from collections.abc import Iterator

CPUS = sorted(os.sched_getaffinity(0))
NODES = (
    Node(0, frozenset(CPUS[:1]), {0: 10, 1: 20}),
    Node(1, frozenset(CPUS[-1:]), {0: 20, 1: 10}),
    Node(2, frozenset(), {}),  # memory alone
)
NICS = tuple(Nic(f"mlx5_{node}", numa=node) for node in (0, 1, 2))


@pytest.fixture(autouse=True)
def affinity_comes_back() -> Iterator[None]:
    before = os.sched_getaffinity(0)
    yield
    os.sched_setaffinity(0, before)


@pytest.mark.parametrize("node", [0, 1])
def test_a_side_stays_on_the_node_of_its_nic(node: int) -> None:
    machine = Machine(nics=NICS, nodes=NODES)
    assert stay_near(f"mlx5_{node},mlx5_2", machine) == NODES[node].cpus
    assert os.sched_getaffinity(0) == NODES[node].cpus


def test_without_a_nic_it_stays_on_the_node_where_it_runs() -> None:
    os.sched_setaffinity(0, CPUS[-1:])
    assert stay_near("", Machine(nodes=NODES)) == {CPUS[-1]}


@pytest.mark.parametrize("machine", [Machine(nodes=NODES[:1]), Machine(nics=NICS, nodes=NODES)])
def test_with_one_node_or_a_node_without_cpus_it_stays_anywhere(machine: Machine) -> None:
    assert stay_near("mlx5_2", machine) == frozenset()
    assert sorted(os.sched_getaffinity(0)) == CPUS


def test_a_buffer_begins_with_a_page() -> None:
    memory = touched_pages(3 * mmap.PAGESIZE)
    assert memory.__array_interface__["data"][0] % mmap.PAGESIZE == 0
    assert memory.size == 3 * mmap.PAGESIZE
