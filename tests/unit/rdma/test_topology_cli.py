from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from sysfs_tree import server

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def sysfs(tmp_path: Path) -> str:
    return str(server(tmp_path / "sys").root)


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MC_", "MOONCAKE_"))}
    return subprocess.run(
        [sys.executable, "-m", "mooncake_connector", "topology", *arguments],
        env=clean | environ,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_json_is_the_matrix_and_can_be_given_back_as_the_topology(
    sysfs: str, tmp_path: Path
) -> None:
    done = run("--json", "--sysfs", sysfs)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert rows["cuda:0"][0] == ["mlx5_bond_4"]
    assert rows["cpu:1"][0] == [f"mlx5_bond_{n}" for n in range(4)]
    rows["cuda:0"] = [["mlx5_bond_0"], []]
    (tmp_path / "topo.json").write_text(json.dumps(rows))
    config = {"engine": {"rdma": {"topology_file": str(tmp_path / "topo.json")}}}
    (tmp_path / "mooncake.json").write_text(json.dumps(config))
    again = run("--json", "--sysfs", sysfs, "--config", str(tmp_path / "mooncake.json"))
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout) == rows


def test_the_tree_names_devices_distances_and_what_the_settings_leave_out(
    sysfs: str, tmp_path: Path
) -> None:
    config = {"engine": {"rdma": {"devices_excluded": ["mlx5_bond_5"]}}}
    (tmp_path / "mooncake.json").write_text(json.dumps(config))
    done = run("--sysfs", sysfs, MOONCAKE_CONFIG_PATH=str(tmp_path / "mooncake.json"))
    assert done.returncode == 0, done.stderr
    lines = [line.strip(" │├└─") for line in done.stdout.splitlines()]
    assert lines[0] == "8 RDMA devices, 8 GPUs, 2 NUMA nodes"
    assert "mlx5_bond_0  0000:73:00.0  node 1  port 1 ACTIVE Ethernet 200 Gb/sec (4X HDR)" in lines
    assert "cuda:0  0000:14:00.0  node 0" in lines
    assert "preferred  mlx5_bond_4 (PIX)" in lines
    assert sum("mlx5_bond_5" in line for line in lines) == 1
    assert next(line for line in lines if "bond_5" in line).endswith("(left out by the settings)")


def test_a_machine_without_rdma_is_shown_as_that(tmp_path: Path) -> None:
    done = run("--sysfs", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "none: no driver is loaded" in done.stdout


def test_a_device_that_is_not_there_is_one_line_and_exit_code_2(sysfs: str, tmp_path: Path) -> None:
    (tmp_path / "mooncake.json").write_text('{"engine": {"rdma": {"devices": ["mlx5_bond_7"]}}}')
    done = run("--sysfs", sysfs, "--config", str(tmp_path / "mooncake.json"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "this machine has no RDMA device 'mlx5_bond_7'" in done.stderr


def test_measuring_wants_a_peer_and_a_file(tmp_path: Path) -> None:
    for half in (("--measure", "10.0.0.2:15000"), ("--out", str(tmp_path / "rails.json"))):
        done = run(*half)
        assert done.returncode == 2
        assert "--measure PEER and --out FILE go together" in done.stderr


def test_measuring_with_nobody_says_so_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "rails.json"
    done = run("--measure", "127.0.0.1:1", "--out", str(out))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith("mooncake-connector: ")  # after the engine's log
    assert "Traceback" not in done.stderr
    assert not out.exists()
