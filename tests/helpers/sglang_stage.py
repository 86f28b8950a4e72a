"""Real SGLang servers for the integration tests, and what they say about themselves."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import subprocess
import sys
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etcd_stage import EtcdServer, wait_until
from harness.completions import token_prompt
from harness.servers import get
from harness.sglang import SGLangServers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from harness.servers import Server
    from harness.sglang import SGLangServer

PAGE = 64  # tokens
PAGE_BYTES = PAGE * (4 << 10)  # of the tiny model: 4 layers, each 1 KiB a token
#: For one reply on two cores that do other things too; a quiet machine needs a second.
REPLY_S = 120.0
#: Until a server without work says so. SGLang aborts 2 s after a streaming client left, and 4 s
#: after one that waits for a whole answer.
IDLE_S = 20.0

SCRIPTS = Path(__file__).parents[2] / "scripts/lib"


class Stage:
    """One aggregated server, which is always right, beside a prefill/decode pair and its router.

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
        self.servers = servers
        self._etcd = etcd.address if etcd is not None else ""
        self._flags = flags or {}
        self._rooms = itertools.count(1)
        self._asked: dict[str, itertools.count[int]] = {}

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

    def alive(self) -> None:
        """Raise `ServerFailed`, with the end of its log, for a server that ended."""
        for server in (self.aggregated, self.prefill, self.decode):
            if not server.running:
                raise server.failure("has ended, though no test killed it")

    def idle(self) -> None:
        """Fail unless both sides come to rest with every page free."""
        self.alive()
        for server in (self.prefill, self.decode):
            wait_until(lambda server=server: at_rest(server), IDLE_S, f"{server.name} is at rest")
        self.alive()

    def prompt(self, length: int, name: str = "") -> list[int]:
        """Token ids that no other request of this run begins with, the same in every run."""
        count = self._asked.setdefault(name, itertools.count())
        return token_prompt(length, zlib.crc32(f"{name} {next(count)} {length}".encode()))


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


def made(model: Path) -> Path:
    """The tiny model's folder, which is made when it is not there."""
    if not model.exists():
        subprocess.run([sys.executable, SCRIPTS / "tiny_model.py", model], check=True, timeout=300)
    return model


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


def until(condition: Callable[[], object], within: float, what: str) -> None:
    """As `wait_until`, for a server that may be starting: no answer is not yet."""

    def met() -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException):
            return bool(condition())
        return False

    wait_until(met, within, what)
