"""SGLang's part of the demo: three servers, its router, and its own benchmark at the end."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from harness import sglang_benchmark
from harness.comparison import Stage, compare, wait_ready
from harness.completions import generate, token_prompt
from harness.sglang import DECODE_RADIX_CACHE, SGLangServers
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from rich.console import Console

# Around one token, one page of 64 and two pages; a few pages; and two chunks of prefill.
LENGTHS = (1, 5, 63, 64, 65, 127, 128, 129, 200, 1000, 5000)
COUNTED_WITHIN_S = 10.0  # a node tells its counts every second, the metrics' files are read then


@contextlib.contextmanager
def opened(logs: Path, model: Path, transport: str, console: Console) -> Iterator[Stage]:
    """Start everything; leaving stops it."""
    with SGLangServers(logs, model) as servers:
        yield _start(servers, transport, console)


def _start(servers: SGLangServers, transport: str, console: Console) -> Stage:
    begin = time.monotonic()
    etcd = servers.etcd()
    console.print(f"etcd is at {etcd}")
    path = {"engine": {"protocol": transport, "strict_transport": transport != "auto"}}
    aggregated = servers.sglang("aggregated")
    prefill = servers.sglang("prefill", etcd=etcd, settings=path)
    decode = servers.sglang("decode", etcd=etcd, settings=path, flags=DECODE_RADIX_CACHE)
    wait_ready((aggregated, prefill, decode), begin, console)
    router = servers.router(prefill, decode)
    with console.status(f"router: waiting until it has found both servers; log: {router.log}"):
        router.wait_ready()
    console.print("SGLang's router has found both servers")
    stage = Stage(aggregated, decode, router, generate, COUNTED_WITHIN_S)
    compare(stage, "a server's first request compiles and allocates", token_prompt(70, seed=-1))
    return stage


def benchmark(stage: Stage, logs: Path, model: Path, console: Console) -> None:
    """`sglang.bench_serving` against both, one after the other."""
    sides = {"aggregated": stage.aggregated, "disaggregated": stage.router}
    shown = Table(
        caption=f"{sglang_benchmark.PROMPTS} prompts of {sglang_benchmark.INPUT_TOKENS} tokens, "
        f"{sglang_benchmark.CONCURRENCY} at a time; ms"
    )
    shown.add_column("sglang.bench_serving")
    figures = {}
    for name, server in sides.items():
        shown.add_column(name, justify="right")
        with console.status(f"sglang.bench_serving: {name}"):
            figures[name] = sglang_benchmark.run(
                server.url, name, logs, model, disaggregated=server is stage.router
            )
    for figure in sglang_benchmark.FIGURES:
        shown.add_row(figure, *(f"{found[figure]:.1f}" for found in figures.values()))
    console.print(shown)
