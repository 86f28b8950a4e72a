"""vLLM's servers of a benchmark: the harness's, with the KV-heavy model and more memory for KV."""

from __future__ import annotations

import json
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.completions import MODEL, CompletionFailed, complete, token_prompt
from harness.servers import HOST, VLLM_ENVIRONMENT, Server, Servers, free_port

from serving.setup import MAX_TOKENS, PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).parents[3]
#: The environment with the peers' wheels, layered on vLLM's.
PEERS_PYTHON = ROOT / ".venv-vllm-peers" / "bin" / "python"
#: Tokens that one engine step computes at most: a prompt of 4096 is three chunks.
CHUNK_TOKENS = 1536
# Two of the longest requests, at 64 KiB a token; more would cost set-ups that are up together.
KV_BYTES = 640 << 20
FLAGS = (
    *("--enforce-eager", "--dtype", "float32", "--block-size", str(PAGE_SIZE)),
    *("--max-model-len", str(MAX_TOKENS), "--max-num-seqs", "8"),
    *("--max-num-batched-tokens", str(CHUNK_TOKENS), "--kv-cache-memory-bytes", str(KV_BYTES)),
)
# Nine servers started at once on two cores.
START_TIMEOUT_S = 900.0
WAKE_TIMEOUT_S, WAKE_POLL_S = 30.0, 0.25
AWAKE = token_prompt(70, seed=-100)


class VllmServers(Servers):
    """All that one set-up starts."""

    def __init__(self, logs: Path, model: Path) -> None:
        super().__init__(logs, model)
        self.model = model
        self._commands: dict[str, str] = {}

    def serve(
        self,
        name: str,
        transfer: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
        python: str | Path = sys.executable,
        *,
        listed: bool = False,
    ) -> Server:
        """Start one server in the environment of `python` and return at once.

        Args:
            name: For its log.
            transfer: `--kv-transfer-config`; None: it does both halves.
            env: More environment.
            python: Whose environment has what the connector needs.
            listed: Tell our connector the server's URL, for its record in etcd.
        """
        port = free_port()
        url = f"http://{HOST}:{port}"
        command = [str(python), "-m", "vllm.entrypoints.cli.main", "serve", str(self.model)]
        command += ["--served-model-name", MODEL, "--host", HOST, "--port", str(port), *FLAGS]
        if transfer is not None:
            more = {"http_url": url} if listed else {}
            more |= transfer.get("kv_connector_extra_config", {})
            config = {**transfer, "kv_connector_extra_config": more}
            command += ["--kv-transfer-config", json.dumps(config)]
        environment = {**VLLM_ENVIRONMENT, **(env or {})}
        self._commands[name] = shlex.join(
            ["env", *(f"{key}={value}" for key, value in environment.items()), *command]
        )
        environment["PYTHONPATH"] = str(Path(__file__).parents[1])  # vllm_on_cpu.py
        log = self._logs / f"{name}.log"
        server = Server(name, url, command, log, environment, timeout_s=START_TIMEOUT_S)
        self._children.append(server)
        return server

    def fixed_proxy(self, prefill: str, decode: str, style: str) -> Server:
        """Our proxy in front of two servers that it is told; any connector's. Returns at once."""
        port = free_port()
        command = [str(Path(sys.executable).with_name("mooncake-connector")), "proxy"]
        command += ["--host", HOST, "--port", str(port), "--prefill", prefill]
        command += ["--decode", decode, "--style", style]
        return self.start("proxy", port, command)

    def round_robin(self, *urls: str) -> Server:
        """VLLM's router in front of regular servers; returns at once."""
        port = free_port()
        command = [str(Path(sys.executable).with_name("vllm-router"))]
        command += ["--worker-urls", *urls, "--policy", "round_robin", "--host", HOST]
        command += ["--port", str(port), "--prometheus-port", str(free_port())]
        return self.start("router", port, command)

    def stop_for_now(self) -> None:
        """Nothing that was started runs until `go_on`; connections stay open."""
        for child in self._children:
            child.signal(signal.SIGSTOP)

    def go_on(self, url: str) -> None:
        """Let all run again; returns when a request to `url` is answered.

        Raises:
            CompletionFailed: It is not, half a minute later.
        """
        for child in self._children:
            child.signal(signal.SIGCONT)
        deadline = time.monotonic() + WAKE_TIMEOUT_S
        while True:  # the proxy takes servers out that did not answer its looks, and back in
            try:
                complete(url, AWAKE, max_tokens=1)
            except (CompletionFailed, OSError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(WAKE_POLL_S)
            else:
                return

    def facts(self) -> dict[str, str]:
        """Command lines of all servers, as a shell takes them, by name."""
        return {f"{name}, command": line for name, line in self._commands.items()}


def said(failed: Exception) -> str:
    """What a server that did not start printed, without what it printed before that."""
    lines = str(failed).splitlines() or [type(failed).__name__]
    # vLLM ends with "Engine core initialization failed. See root cause above": the cause is first.
    telling = [line for line in lines[1:] if "Error" in line and "root cause" not in line]
    return "\n".join([lines[0], *(telling[:4] or lines[1:][-8:])])
