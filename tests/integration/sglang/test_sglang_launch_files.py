"""examples/sglang_1p1d: the three launch files, as a user starts them, on the tiny model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from harness.completions import generate, token_prompt
from harness.servers import HOST, free_port
from harness.sglang import (
    ROLE_FLAGS,
    SGLANG_ENVIRONMENT,
    SGLANG_FLAGS,
    SGLANG_TIMEOUT_S,
    SGLangServers,
)
from harness.transfers import Transfers

if TYPE_CHECKING:
    from harness.servers import Server

FILES = Path(__file__).parents[3] / "examples" / "sglang_1p1d"


@pytest.mark.integration
@pytest.mark.nightly  # two more servers than every change can afford
@pytest.mark.parametrize("registry", ["etcd", "http"])
def test_the_launch_files_make_a_working_pair(
    registry: str, model: Path, logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    monkeypatch.setenv("MODEL", str(model))
    monkeypatch.setenv("HOST", HOST)
    monkeypatch.setenv("BOOTSTRAP_PORT", str(free_port()))
    for name, value in SGLANG_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with SGLangServers(logs / f"launch-files-{registry}", model) as servers:
        if registry == "etcd":
            monkeypatch.setenv("ETCD", servers.etcd())

        def launch(name: str, *flags: str, ready: str = "/health") -> Server:
            port = free_port()
            monkeypatch.setenv("PORT", str(port))
            command = ["bash", str(FILES / f"{name}.sh"), *flags]
            return servers.start(name, port, command, SGLANG_TIMEOUT_S, ready)

        prefill = launch("prefill", *SGLANG_FLAGS, *ROLE_FLAGS["prefill"])
        decode = launch("decode", *SGLANG_FLAGS, *ROLE_FLAGS["decode"])
        for server in (prefill, decode):
            server.wait_ready()
        monkeypatch.setenv("PREFILL", prefill.url)
        monkeypatch.setenv("DECODE", decode.url)
        metrics = ("--prometheus-port", str(free_port()))
        router = launch("router", *metrics, ready="/readiness")
        router.wait_ready()
        before = Transfers.of(decode.url)
        reply = generate(router.url, token_prompt(200, seed=200))
        assert len(reply.tokens) == 16
        assert Transfers.gained(decode.url, before, within_s=30).requests == 1
