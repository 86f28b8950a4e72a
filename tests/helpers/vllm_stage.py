"""Real vLLM servers for the integration tests, and what they say about themselves."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etcd_stage import EtcdServer
from harness.servers import Server, Servers, connector, free_port, get
from kv_recording import FOLDER
from prometheus_client.parser import text_string_to_metric_families
from server_stage import ServerStage, made

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

PAGE = 64  # tokens
PAGE_BYTES = 4 * (64 << 10)  # of the tiny model: 4 layers, each 1 KiB a token
CHUNK = 256  # tokens that prefill computes in one step
#: Of the nodes' records in these tests: how long etcd lists a server that was killed.
LEASE_TTL_S = 5

HELPERS = Path(__file__).parent
#: The connector itself, but for requests whose KV is to be written down.
RECORDER = {"kv_connector": "RecordingConnector", "kv_connector_module_path": "kv_recorder"}


class Stage(ServerStage):
    """A stage whose pair finds its halves in etcd.

    A test may kill a side and start it again; every other test finds both alive.
    """

    def __init__(
        self,
        servers: Servers,
        etcd: EtcdServer,
        recordings: Path,
        flags: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """`recordings`: folder for marked requests; `flags`: more command line by server's name."""
        super().__init__(at_rest)
        self.servers = servers
        self.etcd = etcd
        self.recordings = recordings
        self._flags = flags or {}
        self.bootstrap_port = free_port()
        self.decode_policy = ""  # kv_load_failure_policy
        self._starts: dict[str, int] = {}

    def start(self) -> None:
        """Start all three side by side and wait until they are ready."""
        self.aggregated = self._vllm("aggregated")
        self.start_prefill(wait=False)
        self.start_decode("recompute", wait=False)
        for server in (self.aggregated, self.prefill, self.decode):
            server.wait_ready()

    def start_prefill(self, *, wait: bool = True, **transfer: object) -> None:
        """`transfer` goes over the `--kv-transfer-config`."""
        settings = {"bootstrap_port": self.bootstrap_port}
        self.prefill = self._vllm(
            "prefill",
            self._transfer("kv_producer", settings) | transfer,
            "--max-num-batched-tokens",
            str(CHUNK),
        )
        if wait:
            self.prefill.wait_ready()

    def start_decode(self, policy: str, *, wait: bool = True, **transfer: object) -> None:
        """`policy` is what a failed load leads to: "recompute" or "fail"."""
        self.decode_policy = policy
        self.decode = self._vllm(
            "decode",
            self._transfer("kv_consumer", {}) | {"kv_load_failure_policy": policy} | transfer,
        )
        if wait:
            self.decode.wait_ready()

    def proxy(self, style: str) -> Server:
        """Start an embedded proxy that finds the servers in etcd and takes tests' overrides."""
        name = f"proxy-{style}"
        return self.servers.proxy(
            self.etcd.address, "--style", style, "--allow-overrides", name=name
        )

    def _transfer(self, role: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        # "debug": when a read begins is in the log, and nowhere else that a test could look.
        common = {
            "testing": True,
            "log_level": "debug",
            "engine.metadata.lease_ttl_s": LEASE_TTL_S,
            "engine.shm.share_registered": True,  # the cache changes its pages, and no token
        }
        return connector(role, self.etcd.address, common | settings) | RECORDER

    def _vllm(self, name: str, transfer: Mapping[str, Any] | None = None, *flags: str) -> Server:
        number = self._starts[name] = self._starts.get(name, 0) + 1
        return self.servers.vllm(
            name if number == 1 else f"{name}-{number}",  # of its log
            transfer,
            (*flags, *self._flags.get(name, ())),
            {"PYTHONPATH": str(HELPERS), FOLDER: str(self.recordings)},
        )


@contextlib.contextmanager
def opened(folder: Path, model: Path, **flags: Sequence[str]) -> Iterator[Stage]:
    """A started stage; its logs are in `folder`, `flags` are more command line by server."""
    folder.mkdir(parents=True, exist_ok=True)
    etcd = EtcdServer(folder)
    etcd.start()
    try:
        with Servers(folder, made(model)) as servers:
            stage = Stage(servers, etcd, folder / "kv", flags)
            stage.start()
            yield stage
    finally:
        etcd.kill()


def metric(server: Server, name: str, **labels: str) -> float:
    """The sum of all samples called `name` that have these labels; 0 when there is none."""
    total = 0.0
    for family in text_string_to_metric_families(get(server.url, "/metrics", 30)[1]):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                total += sample.value
    return total


def held_pages(server: Server) -> int:
    """Pages of finished prefills that wait for decode."""
    return int(metric(server, "mooncake_connector:held_pages"))


def waiting(server: Server) -> int:
    """Requests that wait, also those whose KV is on its way."""
    return int(metric(server, "vllm:num_requests_waiting"))


def reads(server: Server, transfer_id: str) -> bool:
    """Whether decode has begun to read that transfer's pages."""
    return f" bytes of transfer {transfer_id} " in server.log.read_text(errors="replace")


def running(server: Server) -> int:
    """Requests that are computed."""
    return int(metric(server, "vllm:num_requests_running"))


def at_rest(server: Server) -> bool:
    """True when no request is there and no page in use or held."""
    names = (
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "mooncake_connector:held_pages",
    )
    return not any(metric(server, name) for name in names)
