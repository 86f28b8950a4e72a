"""SGLang servers, and its router, as real processes on a machine without a GPU.

with SGLangServers(logs, model) as servers:
    pair = [servers.sglang("prefill"), servers.sglang("decode")]
    ...
    router = servers.router(*pair)  # when both are ready
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from harness.servers import HOST, Server, Servers, free_port

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Role = Literal["aggregated", "prefill", "decode"]

# One server is up after 25 s on two quiet cores, three at once after 120 s on two busy ones.
SGLANG_TIMEOUT_S = 400.0
POOL_TOKENS = 8192
CHUNK_TOKENS = 4096  # SGLang's own choice for a small device
BACKEND = "mooncake_connector"

SGLANG_FLAGS = (
    # Only because there is no GPU: the attention kernel, and a pool that is not sized from it.
    *("--device", "cpu", "--attention-backend", "torch_native"),
    *("--max-total-tokens", str(POOL_TOKENS)),
    # What any deployment may choose.
    *("--page-size", "64", "--chunked-prefill-size", str(CHUNK_TOKENS)),
    *("--dtype", "float32", "--max-running-requests", "16"),
    "--sleep-on-idle",  # three idle schedulers would else keep two cores busy
    "--enable-metrics",
)
ROLE_FLAGS: dict[Role, tuple[str, ...]] = {
    "aggregated": (),
    "prefill": (),
    # Only because there is no GPU: the default keeps retracted requests in pinned memory.
    "decode": ("--disaggregation-decode-retraction-backup", "cpu_tensor"),
}
DECODE_RADIX_CACHE = ("--disaggregation-decode-enable-radix-cache",)  # off unless asked for
SGLANG_ENVIRONMENT = {
    # Only because there is no GPU; the second records a CUDA event.
    "SGLANG_USE_CPU_ENGINE": "1",
    "SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX": "0",
    # Loopback only, and no downloads.
    "SGLANG_HOST_IP": HOST,
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",  # three servers share few cores
}


class SGLangServer(Server):
    """One SGLang server; `bootstrap_port` is 0 unless it prefills for others."""

    bootstrap_port = 0


class SGLangServers(Servers):
    """All that one run starts."""

    def sglang(
        self,
        role: Role,
        *,
        etcd: str = "",
        settings: Mapping[str, Any] | None = None,
        name: str = "",
        port: int = 0,
        bootstrap_port: int = 0,
        flags: Sequence[str] = (),
        backend: str = BACKEND,
        launcher: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> SGLangServer:
        """Start one SGLang server and return at once.

        Args:
            role: What it does.
            etcd: "host:port" of an etcd that ranks register in; empty: they use HTTP.
            settings: More settings of our connector, nested as in mooncake.json.
            name: For its log and for messages; default: the role.
            port: 0 takes any.
            bootstrap_port: Ditto.
            flags: More command line; a flag that is given twice has its last value.
            backend: `--disaggregation-transfer-backend`; `etcd` and `settings` are for ours only.
            launcher: What starts SGLang in place of `python -m sglang.launch_server`.
            env: More environment.
        """
        name = name or role
        port = port or free_port()
        command = [*launcher] or [sys.executable, "-m", "sglang.launch_server"]
        command += ["--model-path", str(self._model), "--host", HOST, "--port", str(port)]
        command += [*SGLANG_FLAGS, *ROLE_FLAGS[role], *flags]
        environment = {**SGLANG_ENVIRONMENT, **(env or {})}
        bootstrap_port = bootstrap_port or free_port()
        if role != "aggregated":
            command += ["--disaggregation-mode", role, "--disaggregation-transfer-backend", backend]
            command += ["--disaggregation-bootstrap-port", str(bootstrap_port)]
        if role != "aggregated" and backend == BACKEND:
            config = self._logs / f"{name}.json"
            config.write_bytes(msgspec.json.encode(_settings(etcd, settings or {})))
            environment["MOONCAKE_CONFIG_PATH"] = str(config)
        server = SGLangServer(
            name,
            f"http://{HOST}:{port}",
            command,
            self._logs / f"{name}.log",
            environment,
            timeout_s=SGLANG_TIMEOUT_S,
        )
        server.bootstrap_port = bootstrap_port
        self._children.append(server)
        return server

    def router(self, prefill: SGLangServer, decode: SGLangServer) -> Server:
        """Start SGLang's own router in front of a pair that is ready; returns at once."""
        pair = ["--prefill", prefill.url, str(prefill.bootstrap_port), "--decode", decode.url]
        return self._route(["--pd-disaggregation", *pair])

    def balancer(self, *servers: SGLangServer) -> Server:
        """Ditto in front of regular servers that are ready, which take turns."""
        return self._route(["--worker-urls", *(server.url for server in servers)])

    def _route(self, what: Sequence[str]) -> Server:
        port = free_port()
        command = [sys.executable, "-m", "sglang_router.launch_router", *what]
        command += ["--host", HOST, "--port", str(port), "--policy", "round_robin"]
        command += ["--prometheus-port", str(free_port()), "--prometheus-host", HOST]
        # Its /health is good before it has looked at the servers.
        return self.start("router", port, command, ready_path="/readiness")


def _settings(etcd: str, more: Mapping[str, Any]) -> dict[str, Any]:
    engine: dict[str, Any] = {"host": HOST, **more.get("engine", {})}
    if etcd:
        metadata = {"backend": "etcd", "endpoints": [etcd]}
        engine["metadata"] = metadata | engine.get("metadata", {})
    # As a file holds it, so that a value that JSON has no form for is noticed here.
    settings: dict[str, Any] = json.loads(json.dumps({**more, "engine": engine}))
    return settings
