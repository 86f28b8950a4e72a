"""Real SGLang servers for the integration tests, and what they say about themselves."""

from __future__ import annotations

import contextlib
import itertools
import json
from typing import TYPE_CHECKING, Any

from etcd_stage import EtcdServer
from harness.servers import get
from harness.sglang import SGLangServers
from server_stage import ServerStage, made

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from harness.servers import Server
    from harness.sglang import SGLangServer

PAGE = 64  # tokens
PAGE_BYTES = PAGE * (4 << 10)  # of the tiny model: 4 layers, each 1 KiB a token


class Stage(ServerStage):
    """A stage whose pair stands behind SGLang's router.

    A test may kill a side and start it again; every other test finds all alive.
    """

    aggregated: SGLangServer
    prefill: SGLangServer
    decode: SGLangServer
    router: Server

    def __init__(
        self,
        servers: SGLangServers,
        etcd: EtcdServer | None,
        flags: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Without `etcd`, ranks register by HTTP; `flags`: more command line by server."""
        super().__init__(at_rest)
        self.servers = servers
        self._etcd = etcd.address if etcd is not None else ""
        self._flags = flags or {}
        self._rooms = itertools.count(1)

    def start(self) -> None:
        """Start all side by side and wait until they are ready."""
        self.aggregated = self.servers.sglang("aggregated", flags=self._flags.get("aggregated", ()))
        self.prefill = self._half("prefill")
        self.decode = self._half("decode")
        for server in (self.aggregated, self.prefill, self.decode):
            server.wait_ready()
        self.router = self.servers.router(self.prefill, self.decode)
        self.router.wait_ready()

    def restart_prefill(self) -> None:
        """Start a prefill server on the ports of the one that was killed."""
        old = self.prefill
        port = int(old.url.rpartition(":")[2])
        self.prefill = self._half(
            "prefill", name="prefill-2", port=port, bootstrap_port=old.bootstrap_port
        )
        self.prefill.wait_ready()

    def _half(self, role: Any, **how: Any) -> SGLangServer:  # noqa: ANN401 - as `sglang` takes them
        return self.servers.sglang(
            role,
            etcd=self._etcd,
            settings={"testing": True},
            flags=self._flags.get(role, ()),
            **how,
        )

    def room(self) -> int:
        """A bootstrap_room that no other request of this run has."""
        return next(self._rooms)


@contextlib.contextmanager
def opened(
    folder: Path, model: Path, *, with_etcd: bool = True, **flags: Sequence[str]
) -> Iterator[Stage]:
    """A started stage; its logs are in `folder`, `flags` are more command line by server."""
    folder.mkdir(parents=True, exist_ok=True)
    etcd = EtcdServer(folder) if with_etcd else None
    if etcd is not None:
        etcd.start()
    try:
        with SGLangServers(folder, made(model)) as servers:
            stage = Stage(servers, etcd, flags)
            stage.start()
            yield stage
    finally:
        if etcd is not None:
            etcd.kill()


def load(server: Server) -> dict[str, int]:
    """Requests and tokens of its scheduler, which looks twenty times a second while it has any."""
    now = json.loads(get(server.url, "/v1/loads", 30)[1])["loads"][0]
    queues = now["disaggregation"]
    return {
        "running": now["num_running_reqs"],
        "waiting": now["num_waiting_reqs"],
        "used tokens": now["num_used_tokens"],
        "bootstrap": queues["prefill_bootstrap_queue_reqs"],
        "inflight": queues["prefill_inflight_queue_reqs"],
        "prealloc": queues["decode_prealloc_queue_reqs"],
        "transfer": queues["decode_transfer_queue_reqs"],
    }


def at_rest(server: Server) -> bool:
    """True when no request is there and no page in use.

    A scheduler that comes to rest counts its pages before it says so, and ends when some are
    missing.
    """
    return not any(load(server).values())
