"""examples/vllm_1p1d: the three launch files, as a user starts them, on the tiny model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from harness.completions import complete, token_prompt
from harness.servers import (
    HOST,
    VLLM_ENVIRONMENT,
    VLLM_FLAGS,
    VLLM_TIMEOUT_S,
    Servers,
    free_port,
)
from harness.transfers import Transfers

FILES = Path(__file__).parents[2] / "examples" / "vllm_1p1d"


@pytest.mark.integration
@pytest.mark.nightly  # two more servers than every change can afford
def test_the_launch_files_make_a_working_pair(
    model: Path, logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    monkeypatch.setenv("MODEL", str(model))
    monkeypatch.setenv("HOST", HOST)
    for name, value in VLLM_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with Servers(logs / "launch-files", model) as servers:
        monkeypatch.setenv("ETCD", servers.etcd())

        def launch(name: str, *flags: str, timeout_s: float = VLLM_TIMEOUT_S):  # noqa: ANN202 - a Server
            port = free_port()
            monkeypatch.setenv("PORT", str(port))
            command = ["bash", str(FILES / f"{name}.sh"), *flags]
            return servers.start(name, port, command, timeout_s=timeout_s)

        flags = (*VLLM_FLAGS, "--served-model-name", "tiny")
        prefill, decode = launch("prefill", *flags), launch("decode", *flags)
        for server in (prefill, decode):
            server.wait_ready()
        front = launch("front", timeout_s=60)
        front.wait_ready()
        reply = complete(front.url, token_prompt(200, seed=200))
        assert len(reply.tokens) == 16
        assert Transfers.of(decode.url).requests == 1
