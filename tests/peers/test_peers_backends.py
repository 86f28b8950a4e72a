"""Real peers move real bytes. They are in .venv-peers: `scripts/nightly peers`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, cast

import pytest
from peers.blocks import scattered

from mooncake_connector.bench.base import Route
from mooncake_connector.bench.conditions import Workload
from mooncake_connector.bench.pair import Pair

if TYPE_CHECKING:
    from pathlib import Path

    from mooncake_connector.bench.base import Backend, Variant

PEERS = ("mooncake", "nixl", "ucx", "zmq", "gloo")


def backend(name: str) -> Backend:
    return cast("Backend", importlib.import_module(f"mooncake_connector.bench.backends.{name}"))


def every_variant() -> list[object]:
    found: list[object] = []
    for name in PEERS:
        found += [
            pytest.param(name, variant, id=variant.name.replace(", ", "-"))
            for route in Route
            for variant in backend(name).variants(route)
        ]
    return found


def reads_and_writes(count: int, size: int, threads: int = 1) -> Workload:
    moved = tuple(scattered(op, count, size) for op in ("read", "write"))
    return Workload(name=f"{count} x {size}", work=(moved,) * threads)


@pytest.mark.parametrize(("name", "variant"), every_variant())
def test_a_peer_moves_the_bytes_of_scattered_blocks_and_of_one(
    name: str, variant: Variant, tmp_path: Path
) -> None:
    assert not backend(name).missing()
    workloads = [reads_and_writes(300, 4096), reads_and_writes(1, 4096)]
    with Pair(variant, max(each.buffer_bytes for each in workloads), tmp_path) as pair:
        for each in workloads:
            pair.check(each)
            pair.prepare(each, warm_up_s=0.0)
            assert pair.measure(0.0, runs=4).samples.size == 4
