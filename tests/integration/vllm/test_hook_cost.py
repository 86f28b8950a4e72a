"""A waiting engine calls the connector's hooks several hundred times a second."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness.servers import VLLM_ENVIRONMENT, VLLM_TIMEOUT_S
from server_stage import made

# A vLLM of its own, one more than every change can afford.
pytestmark = [pytest.mark.integration, pytest.mark.nightly]

TARGET_US = 50.0
NOISE = 10.0  # on a machine that does other things too


def test_a_set_of_hooks_with_nothing_to_do_costs_microseconds(
    model: Path, logs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (logs / "hook_cost.log").open("wb") as log:
        done = subprocess.run(
            [sys.executable, Path(__file__).with_name("hook_cost.py"), made(model)],
            env={**os.environ, **VLLM_ENVIRONMENT},
            stdout=subprocess.PIPE,
            stderr=log,
            timeout=VLLM_TIMEOUT_S,
            check=True,
        )
    costs = json.loads(done.stdout.splitlines()[-1])
    with capsys.disabled():
        print(f"\none set of hooks, microseconds: {costs}")
    assert costs["held_pages"] > 0
    assert costs["idle"] < TARGET_US * NOISE
    assert costs["holding"] < TARGET_US * NOISE
