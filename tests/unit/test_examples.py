"""The examples that need neither GPU nor vLLM run, and do what their first lines say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from mooncake_engine.testing import conformance

EXAMPLES = Path(__file__).parents[2] / "examples"
TIMEOUT_S = 50.0  # a loaded machine takes 20 s for the longer one


def run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S, check=True
    )
    return done.stdout


@pytest.mark.parametrize("protocol", ["shm", "tcp"])
def test_two_processes_move_bytes(protocol: str) -> None:
    script = str(EXAMPLES / "two_processes.py")
    with subprocess.Popen(
        [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as offering:
        assert offering.stdout is not None
        name = offering.stdout.readline().strip()
        told = run(script, "--protocol", protocol, name)
        rest, _ = offering.communicate(timeout=TIMEOUT_S)
    assert told.startswith(f"path: {protocol} ")
    assert "read 1024 pieces" in told
    assert "the note says 'hello from 127.0.0.1:" in rest
    assert offering.returncode == 0


def test_the_example_transport_keeps_the_contract() -> None:
    told = run(str(EXAMPLES / "own_transport.py")).splitlines()
    applying = [check for check in conformance.CHECKS if not (check.needs_child or check.needs_say)]
    assert told == [f"kept: {check.name.replace('_', ' ')}" for check in applying]
