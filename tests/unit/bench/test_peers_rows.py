from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, cast

import numpy as np
import pytest
from peers.blocks import KIB, apart, scattered
from peers.rows import Group, Kind, groups, quick

from mooncake_connector.bench.runs import merged

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mooncake_connector.bench.base import Backend, Transfer

ALL = {group.key: group for group in (*groups(), quick())}


def moved_bytes(transfer: Transfer) -> NDArray[np.uint64]:
    """(local, remote) of every single byte, in the order of the remote side."""
    rows = [
        np.stack([np.arange(length) + local, np.arange(length) + remote], axis=1)
        for local, remote, length in zip(
            transfer.local.tolist(),
            transfer.remote.tolist(),
            transfer.lengths.tolist(),
            strict=True,
        )
    ]
    pairs = np.concatenate(rows)
    return cast("NDArray[np.uint64]", pairs[np.argsort(pairs[:, 1])])


def names(group: Group) -> list[str]:
    found = []
    for name in group.backends:
        module = importlib.import_module(f"mooncake_connector.bench.backends.{name}")
        found += [variant.name for variant in cast("Backend", module).variants(group.route)]
    return [name for name in found if not group.most or name.startswith(group.most)]


@pytest.mark.parametrize("count", [1, 2, 3, 64, 2048])
def test_scattered_blocks_lie_apart_inside_twice_their_space(count: int) -> None:
    transfer = scattered("read", count, 16)
    for offsets in (transfer.local, transfer.remote):
        assert np.unique(offsets // 16).size == count
        assert not (offsets % 16).any()
        assert int(offsets.max()) < 2 * count * 16


def test_the_scattered_list_is_the_same_in_every_run() -> None:
    one, other = scattered("read", 2048, 4 * KIB), scattered("write", 2048, 4 * KIB)
    assert np.array_equal(one.local, other.local)
    assert np.array_equal(one.remote, other.remote)


def test_merging_leaves_every_byte_where_it_was_in_fewer_runs() -> None:
    transfer = scattered("read", 200, 16)
    fewer = merged(transfer)
    assert 100 < fewer.lengths.size < 150  # half of the blocks lie alone
    assert np.array_equal(moved_bytes(fewer), moved_bytes(transfer))


def test_blocks_that_lie_apart_cannot_be_merged() -> None:
    assert merged(apart("read", 500, 16)).lengths.size == 500


@pytest.mark.parametrize("key", ALL)
def test_each_goal_is_about_a_workload_and_variants_that_its_group_measures(key: str) -> None:
    group = ALL[key]
    workloads = {workload.name for workload in group.workloads}
    variants = names(group)
    for goal in group.goals:
        assert goal.workload in workloads
        assert goal.ours in variants
        assert not goal.beside or goal.beside in workloads
        assert bool(goal.beside) == (goal.kind in (Kind.P50, Kind.P99, Kind.DROP))
        for rival in goal.against:
            if not rival.startswith(("Mooncake", "gloo")) or group.route == "tcp":
                assert any(name.startswith(rival) for name in variants), rival


def test_the_groups_have_names_of_their_own() -> None:
    assert len(ALL) == len(groups()) + 1
