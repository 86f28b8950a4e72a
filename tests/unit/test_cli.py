from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from typing import TYPE_CHECKING

from mooncake_connector.config import FIELDS

if TYPE_CHECKING:
    from pathlib import Path


def run(folder: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """The command, with this machine's environment but for Mooncake's variables."""
    ours = ("MC_", "MOONCAKE_", "NCCL_", "WITH_NVIDIA_PEERMEM")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    return subprocess.run(
        [sys.executable, "-m", "mooncake_connector", *arguments],
        cwd=folder,
        env={**clean, **environ},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_version_is_that_of_the_distribution(tmp_path: Path) -> None:
    done = run(tmp_path, "--version")
    assert (done.returncode, done.stdout) == (0, metadata.version("mooncake-connector") + "\n")


def test_init_writes_a_file_that_check_accepts_and_never_overwrites_unasked(tmp_path: Path) -> None:
    assert run(tmp_path, "config", "init").returncode == 0
    written = (tmp_path / "mooncake.json").read_text()
    checked = run(tmp_path, "config", "check", "mooncake.json")
    assert checked.returncode == 0
    rows = [line.split("│") for line in checked.stdout.splitlines() if line.startswith("│")]
    assert {row[1].strip(): row[3].strip() for row in rows} == dict.fromkeys(
        FIELDS, "mooncake.json"
    )
    (tmp_path / "mooncake.json").write_text("precious")
    refused = run(tmp_path, "config", "init")
    assert refused.returncode == 2
    assert refused.stderr == "mooncake-connector: mooncake.json exists; --force overwrites it\n"
    assert (tmp_path / "mooncake.json").read_text() == "precious"
    assert run(tmp_path, "config", "init", "--force").returncode == 0
    assert (tmp_path / "mooncake.json").read_text() == written


def test_check_shows_values_origins_and_notices_but_no_password(tmp_path: Path) -> None:
    (tmp_path / "mooncake.json").write_text(
        '{"metadata_server": "[fe80::1]:2379",'
        ' "engine": {"metadata": {"username": "u", "password": "hunter2"}}}'
    )
    done = run(
        tmp_path,
        "config",
        "check",
        MOONCAKE_CONFIG_PATH="mooncake.json",
        MC_TCP_LANES_PER_PEER="7",
        MC_HANDSHAKE_PORT="1",
        MC_IB_PORT="2",
    )
    assert done.returncode == 0, done.stderr
    rows = {
        cells[1].strip(): (cells[2].strip(), cells[3].strip())
        for cells in (line.split("│") for line in done.stdout.splitlines())
        if len(cells) > 3
    }
    assert rows["engine.tcp.lanes_per_peer"] == ("7", "MC_TCP_LANES_PER_PEER")
    assert rows["engine.metadata.endpoints"] == ('["[fe80::1]:2379"]', "mooncake.json")
    assert rows["engine.metadata.password"] == ("***", "mooncake.json")
    assert rows["engine.host"] == ('""', "default")
    assert rows["engine.rdma.port"] == ("2", "MC_IB_PORT")
    assert "not applied: MC_HANDSHAKE_PORT (queue pairs are exchanged over" in done.stdout
    assert "hunter2" not in done.stdout


def test_what_cannot_be_used_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "mooncake.json").write_text('{"engine": {"tcp": {"lanes_per_pear": 1}}}')
    done = run(tmp_path, "config", "check", "mooncake.json")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "mooncake-connector: mooncake.json: unknown setting 'engine.tcp.lanes_per_pear'; "
        "did you mean 'engine.tcp.lanes_per_peer'?\n"
    )


def test_a_proxy_with_nobody_behind_it_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path, "proxy")
    assert done.returncode == 2
    assert "nobody to send requests to: give --prefill and --decode" in done.stderr
