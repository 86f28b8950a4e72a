"""`mooncake-connector topology --measure` with a running engine, and what its file then decides."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import msgspec
import pytest
import rails
from mooncake_engine import Status, TransferEngine, topology
from mooncake_engine.testing import conformance
from mooncake_engine.testing.conformance import LIMIT_S, MIB, Pair, runs_of
from mooncake_engine.testing.target import ChildTarget
from mooncake_engine.types import Op
from rdma_stage import OURS, THEIRS, config

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from rails import Rail

SETTINGS = {"send_timeout": 15, "send_retry_count": 2}
NOISE = 64 << 10


@pytest.fixture
def target() -> Iterator[ChildTarget]:
    with ChildTarget(config(*THEIRS, **SETTINGS), 2 * MIB) as child:
        yield child


def carried(target: ChildTarget, file: Path, both: tuple[Rail, Rail]) -> list[int]:
    """Bytes that each rail carries of two MiB, with this file of measured pairs."""
    with TransferEngine(config(*OURS, rail_topology_file=str(file), **SETTINGS)) as engine:
        pair = Pair(engine, target, target_has_a_say=False)
        before = [rails.bytes_sent(rail.devices[0]) for rail in both]
        end = pair.submit(Op.WRITE, pair.open(), runs_of((0, 0, 2 * MIB))).wait(LIMIT_S)
        conformance.expect(end, Status.OK)
        after = [rails.bytes_sent(rail.devices[0]) for rail in both]
    return [now - then for now, then in zip(after, before, strict=True)]


def test_the_pairs_that_work_are_measured_and_the_file_decides_which_are_used(
    both_rails: tuple[Rail, Rail], target: ChildTarget, tmp_path: Path
) -> None:
    out, settings = tmp_path / "rails.json", tmp_path / "mooncake.json"
    engine = json.loads(msgspec.json.encode(config(*OURS, **SETTINGS)))
    settings.write_text(json.dumps({"engine": engine}))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mooncake_connector", "topology", "--measure"),
            *(target.record.name, "--out", str(out), "--config", str(settings)),
            *("--seconds", "0.2"),
        ],
        env={k: v for k, v in os.environ.items() if not k.startswith("MC_")},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    for crossed in ("rxe0 -> rxe3", "rxe2 -> rxe1"):
        assert f"{crossed}  left out: " in done.stderr
    (record,) = topology.load_rails(out).records
    working = [rail.devices for rail in both_rails]
    assert [(pair.src_dev, pair.dst_dev) for pair in record.endpoints] == working
    assert all(pair.bandwidth > 0 < pair.latency for pair in record.endpoints)
    assert set(topology.load_rails(out).best()) == set(working)
    assert min(carried(target, out, both_rails)) > 0.9 * MIB

    second = {
        key: tuple(pair for pair in pairs if pair.src_dev == OURS[1])
        for key, pairs in record.partition_matchings.items()
    }
    topology.dump_rails(out, msgspec.structs.replace(record, partition_matchings=second))
    by_first, by_second = carried(target, out, both_rails)
    assert by_first < NOISE
    assert by_second > 2 * MIB
