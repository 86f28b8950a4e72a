"""vLLM's part of the demo: three servers and our own proxy."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from harness.comparison import Stage, compare, wait_ready
from harness.completions import complete, token_prompt
from harness.servers import Servers, connector

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from rich.console import Console

# Around one token, one page of 64 and two pages; then a few pages.
LENGTHS = (1, 3, 63, 64, 65, 127, 128, 129, 200, 500)


@contextlib.contextmanager
def opened(logs: Path, model: Path, transport: str, console: Console) -> Iterator[Stage]:
    """Start everything; leaving stops it."""
    with Servers(logs, model) as servers:
        yield _start(servers, transport, console)


def _start(servers: Servers, transport: str, console: Console) -> Stage:
    begin = time.monotonic()
    etcd = servers.etcd()
    console.print(f"etcd is at {etcd}")
    path = {"engine.protocol": transport, "engine.strict_transport": transport != "auto"}
    started = [
        servers.vllm("aggregated"),
        servers.vllm("prefill", connector("kv_producer", etcd, path)),
        servers.vllm("decode", connector("kv_consumer", etcd, path)),
    ]
    aggregated, _, decode = started
    wait_ready(started, begin, console)
    proxy = servers.proxy(etcd)
    with console.status(f"proxy: waiting until it has found both servers; log: {proxy.log}"):
        proxy.wait_ready()
    console.print("proxy has found both servers")
    stage = Stage(aggregated, decode, proxy, complete)
    compare(stage, "a server's first request compiles and allocates", token_prompt(70, seed=-1))
    return stage
