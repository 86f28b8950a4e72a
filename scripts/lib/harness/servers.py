"""etcd, vLLM and the proxy as real processes on this machine.

    with Servers(logs, model) as servers:
        etcd = servers.etcd()
        prefill = servers.vllm("prefill", connector("kv_producer", etcd))
        prefill.wait_ready()

Everything listens on loopback only, on ports that were free a moment ago.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import shutil
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from harness.completions import MODEL
from harness.process import Child, stop_all

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

HOST = "127.0.0.1"
PORTS = (20000, 32000)  # Linux gives 32768 to 60999 to outgoing connections
ETCD_TIMEOUT_S = 30.0
PROXY_TIMEOUT_S = 60.0
# One server is up after 45 s on two quiet cores, three at once after 125 s on two busy ones.
VLLM_TIMEOUT_S = 400.0

# Small and eager: torch.compile alone would take 200 s here; 64 MiB of KV are 256 pages of 64.
VLLM_FLAGS = (
    *("--enforce-eager", "--dtype", "float32"),
    *("--max-model-len", "2048", "--max-num-seqs", "8"),
    *("--kv-cache-memory-bytes", str(64 << 20), "--block-size", "64"),
)
VLLM_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "OMP_NUM_THREADS": "1",  # three servers share few cores
    # Else every server pins its worker to the same core and spins there: requests took minutes.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": HOST,
}


def connector(role: str, etcd: str, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`--kv-transfer-config` of one side; `settings` are more connector settings, dotted keys."""
    return {
        "kv_connector": "MooncakeDisaggConnector",
        "kv_role": role,
        "kv_connector_extra_config": {
            "engine.host": HOST,
            "engine.metadata.backend": "etcd",
            "engine.metadata.endpoints": [etcd],
            **(settings or {}),
        },
    }


class Server(Child):
    """A child that serves HTTP at `url`; ready when `GET /health`, or `ready_path`, says so."""

    def __init__(
        self,
        name: str,
        url: str,
        command: Sequence[str],
        log: Path,
        env: Mapping[str, str] | None = None,
        *,
        timeout_s: float,
        ready_path: str = "/health",
    ) -> None:
        super().__init__(name, command, log, env)
        self.url = url
        self._ready_path = ready_path
        self._timeout_s = timeout_s

    def healthy(self) -> bool:
        """One look."""
        try:
            return get(self.url, self._ready_path)[0] == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False

    def wait_ready(self) -> None:
        """Return when healthy; `ServerFailed` with the end of the log when that does not come."""
        self.wait_until(self.healthy, self._timeout_s)


class Servers:
    """All that one run starts. Leaving the context stops every one, the last one first."""

    def __init__(self, logs: Path, model: Path) -> None:
        """`logs`: a folder for one log per server; `model`: the folder of the tiny model."""
        logs.mkdir(parents=True, exist_ok=True)
        self._logs = logs
        self._model = model
        self._children: list[Child] = []

    def etcd(self, port: int = 0, data: str = "etcd") -> str:
        """Start an empty etcd on `port` (0: any), wait for it; returns its "host:port"."""
        port = port or free_port()
        folder = self._logs / data
        shutil.rmtree(folder, ignore_errors=True)
        server = Server(
            "etcd",
            f"http://{HOST}:{port}",
            [
                _tool("mooncake-connector"),
                *("etcd", "--data-dir", str(folder), "--host", HOST),
                *("--port", str(port), "--peer-port", str(free_port())),
            ],
            self._logs / "etcd.log",
            timeout_s=ETCD_TIMEOUT_S,
        )
        self._children.append(server)
        server.wait_ready()
        return f"{HOST}:{port}"

    def vllm(
        self,
        name: str,
        transfer: Mapping[str, Any] | None = None,
        flags: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> Server:
        """Start one vLLM server and return at once.

        Args:
            name: For its log and for messages.
            transfer: From `connector`; None for a server that does both halves by itself.
            flags: More command line.
            env: More environment.
        """
        port = free_port()
        url = f"http://{HOST}:{port}"
        command = [_tool("vllm"), "serve", str(self._model), "--served-model-name", MODEL]
        command += ["--host", HOST, "--port", str(port), *VLLM_FLAGS, *flags]
        if transfer is not None:
            settings = {"http_url": url, **transfer["kv_connector_extra_config"]}
            command += [
                "--kv-transfer-config",
                json.dumps({**transfer, "kv_connector_extra_config": settings}),
            ]
        server = Server(
            name,
            url,
            command,
            self._logs / f"{name}.log",
            {**VLLM_ENVIRONMENT, **(env or {})},
            timeout_s=VLLM_TIMEOUT_S,
        )
        self._children.append(server)
        return server

    def proxy(self, etcd: str, *flags: str, name: str = "proxy") -> Server:
        """Start the embedded proxy, which finds the servers in etcd; returns at once."""
        port = free_port()
        config = self._logs / f"{name}.json"
        metadata = {"backend": "etcd", "endpoints": [etcd]}
        config.write_text(json.dumps({"engine": {"metadata": metadata}}))
        return self.start(
            name,
            port,
            [
                _tool("mooncake-connector"),
                *("proxy", "--host", HOST, "--port", str(port), "--config", str(config), *flags),
            ],
        )

    def start(
        self,
        name: str,
        port: int,
        command: Sequence[str],
        timeout_s: float = PROXY_TIMEOUT_S,
        ready_path: str = "/health",
    ) -> Server:
        """Start any other HTTP server that listens on `port`; returns at once."""
        url = f"http://{HOST}:{port}"
        log = self._logs / f"{name}.log"
        server = Server(name, url, command, log, timeout_s=timeout_s, ready_path=ready_path)
        self._children.append(server)
        return server

    def close(self) -> None:
        """Stop everything; idempotent."""
        children, self._children = self._children[::-1], []
        stop_all(children)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def free_port() -> int:
    """A port of loopback that nobody listens on now.

    Another process may take it meanwhile; the server that then fails says so in its log. It is not
    one that the kernel gives to outgoing connections: a server that listens 20 s after it was
    started has found its port taken by one of those.
    """
    low, high = PORTS
    for port in random.sample(range(low, high), k=100):
        with contextlib.suppress(OSError), socket.create_server((HOST, port)):
            return port
    raise OSError(f"100 ports of {HOST} from {low} to {high} were all in use")


def get(url: str, path: str, timeout_s: float = 5.0) -> tuple[int, str]:
    """Status and body of one GET. `OSError` or `HTTPException` when there is no answer."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=timeout_s)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def _tool(name: str) -> str:
    """A command of this environment, whether or not it is activated."""
    return str(Path(sys.executable).parent / name)
