"""The command itself, in processes of its own, over real sockets."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import msgspec

from mooncake_connector.bench.results import Result

if TYPE_CHECKING:
    from pathlib import Path

SMALL = ("--duration", "0.05", "--check-consistency", "--no-limits")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "mooncake_connector", "bench", "transfer", *arguments]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        cwd=folder,
        env={**os.environ, "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=50,
    )


def test_a_sweep_checks_every_byte_and_its_json_has_what_the_table_shows(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        *("--op_type", "mix", "--start-block-size", "4K", "--max_block_size=8K"),
        *("--total_buffer_size", "16K", "--batch_size", "1", "--threads", "2,3"),
        *(*SMALL, "--json", "result.json"),
    )
    assert done.returncode == 0, done.stderr
    result = msgspec.json.decode((tmp_path / "result.json").read_bytes(), type=Result)
    assert result.options.check_consistency
    assert [(line.threads, line.block, line.note) for line in result.lines] == [
        (2, 4096, ""),
        (2, 8192, ""),
        (3, 4096, ""),
        (3, 8192, "skipped: needs 24576 of 16384 bytes"),
    ]
    first, *rows = done.stdout.splitlines()
    assert first.split()[:2] == ["Threads", "BlkSize"]
    for line, row in zip(result.lines, rows, strict=True):
        figures = line.figures
        assert row.split()[:3] == [str(line.threads), str(line.block), "1"]
        assert (figures is None) == bool(line.note)
        if figures is not None:
            assert f"{figures.bandwidth:.3f}" in row.split()
            assert 0 < figures.p50 <= figures.p99 <= figures.p999
            assert figures.between >= figures.mean > 0
            assert figures.rounds == 1
    assert len(result.turns) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]  # its logs are gone


def test_a_target_and_its_initiator_are_two_commands_and_ctrl_c_ends_the_target(
    tmp_path: Path,
) -> None:
    with subprocess.Popen(
        command("--mode=target"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as target:
        try:
            assert target.stdout is not None
            told = re.fullmatch(
                r"To start initiators, run mooncake-connector bench transfer (\S+) (\S+)\n",
                target.stdout.readline(),
            )
            assert told
            done = run(tmp_path, *told.groups(), "--block_size", "64K", "--batch_size", "8", *SMALL)
            assert done.returncode == 0, done.stderr
            assert len(done.stdout.splitlines()) == 2
            target.send_signal(signal.SIGINT)
            _, errors = target.communicate(timeout=20)
            assert (target.returncode, "Traceback" in errors) == (0, False)
        finally:
            target.kill()


def test_what_cannot_be_done_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = run(tmp_path, "--workload", "kv", "--total_buffer_size", "1M")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"mooncake-connector: 2048 tokens .*--total_buffer_size.*\n", done.stderr)


def test_a_target_that_is_not_there_is_named_and_ends_the_run(tmp_path: Path) -> None:
    done = run(tmp_path, "--target_seg_name", "127.0.0.1:1", "--max_block_size", "8K", *SMALL)
    assert done.returncode == 1
    assert "no benchmark target answers at 127.0.0.1:1" in done.stderr
    assert done.stdout.count("no benchmark target answers") == 1  # no second row is tried
