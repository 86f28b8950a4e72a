"""`scripts/demo`: one aggregated vLLM server beside one prefill/decode pair, token by token."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import msgspec
from harness.completions import Reply, complete, token_prompt
from harness.process import ServerFailed, end_like_ctrl_c
from harness.servers import Server, Servers, connector
from harness.transfers import Transfers
from rich.console import Console
from rich.table import Table

TOKENS = 24  # per prompt: enough for a wrong page to show
# Around one token, one page of 64 and two pages; then a few pages.
LENGTHS = (1, 3, 63, 64, 65, 127, 128, 129, 200, 500)
SHARED_PREFIX = 256  # four pages; the second prompt moves only what decode lacks
SUFFIXES = (20, 44)


class Row(msgspec.Struct, frozen=True):
    """One prompt on both sides. Times in milliseconds, but for names that say otherwise."""

    prompt: str
    tokens: int
    equal: bool
    ttft_aggregated_ms: float
    ttft_disaggregated_ms: float
    itl_aggregated_ms: float
    itl_disaggregated_ms: float
    kv_bytes: int
    transfer_ms: float
    path: str
    aggregated_tokens: tuple[int, ...]
    disaggregated_tokens: tuple[int, ...]


class Result(msgspec.Struct, frozen=True):
    """What `--json` writes."""

    prompts: int
    identical: int
    path: str
    rows: list[Row]


def prompts() -> dict[str, list[int]]:
    """Name -> token ids."""
    named = {f"length {length}": token_prompt(length, seed=length) for length in LENGTHS}
    prefix = token_prompt(SHARED_PREFIX, seed=0)
    for suffix in SUFFIXES:
        named[f"{SHARED_PREFIX} shared + {suffix}"] = prefix + token_prompt(suffix, seed=-suffix)
    return named


def start(servers: Servers, transport: str, console: Console) -> tuple[Server, Server, Server]:
    """Everything up: (aggregated, decode, proxy)."""
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
    for server in started:
        with console.status(f"{server.name}: starting (up to 400 s); log: {server.log}"):
            server.wait_ready()
        console.print(f"{server.name} is ready after {time.monotonic() - begin:.0f} s")
    proxy = servers.proxy(etcd)
    with console.status(f"proxy: waiting until it has found both servers; log: {proxy.log}"):
        proxy.wait_ready()
    console.print("proxy has found both servers")
    for server in (aggregated, proxy):  # a server's first request compiles and allocates
        complete(server.url, token_prompt(70, seed=-1), max_tokens=4)
    return aggregated, decode, proxy


def compare(name: str, prompt: list[int], aggregated: Server, proxy: Server, decode: Server) -> Row:
    """Send one prompt both ways."""
    here = complete(aggregated.url, prompt, max_tokens=TOKENS)
    before = Transfers.of(decode.url)
    there = complete(proxy.url, prompt, max_tokens=TOKENS)
    moved = Transfers.of(decode.url).since(before)
    return _row(name, here, there, moved)


def _row(name: str, here: Reply, there: Reply, moved: Transfers) -> Row:
    return Row(
        prompt=name,
        tokens=len(here.tokens),
        equal=here.tokens == there.tokens and len(here.tokens) == TOKENS,
        ttft_aggregated_ms=here.ttft_s * 1e3,
        ttft_disaggregated_ms=there.ttft_s * 1e3,
        itl_aggregated_ms=here.itl_s * 1e3,
        itl_disaggregated_ms=there.itl_s * 1e3,
        kv_bytes=moved.nbytes,
        transfer_ms=moved.seconds * 1e3,
        path=moved.path,
        aggregated_tokens=here.tokens,
        disaggregated_tokens=there.tokens,
    )


def table(rows: list[Row]) -> Table:
    """What the terminal shows."""
    shown = Table(caption="aggregated / disaggregated; times in milliseconds")
    for heading in ("prompt", "tokens equal?"):
        shown.add_column(heading)
    for heading in ("TTFT", "ITL", "KV bytes", "transfer"):
        shown.add_column(heading, justify="right")
    shown.add_column("path")
    for row in rows:
        shown.add_row(
            row.prompt,
            f"yes ({row.tokens})" if row.equal else "[bold red]NO[/]",
            f"{row.ttft_aggregated_ms:.0f} / {row.ttft_disaggregated_ms:.0f}",
            f"{row.itl_aggregated_ms:.1f} / {row.itl_disaggregated_ms:.1f}",
            f"{row.kv_bytes:,}",
            f"{row.transfer_ms:.2f}",
            row.path,
        )
    return shown


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Exit status: 0 when every token is the same."""
    rows: list[Row] = []
    with Servers(arguments.logs, arguments.model) as servers:
        aggregated, decode, proxy = start(servers, arguments.transport, console)
        named = prompts()
        with console.status("") as status:
            for number, (name, prompt) in enumerate(named.items(), 1):
                status.update(f"prompt {number} of {len(named)}: {name}")
                rows.append(compare(name, prompt, aggregated, proxy, decode))
        console.print("stopping the servers")
    identical = sum(row.equal for row in rows)
    paths = sorted({row.path for row in rows} - {"-"})
    result = Result(len(rows), identical, "+".join(paths) or "-", rows)
    console.print(table(rows))
    console.print(
        f"{identical} of {len(rows)} prompts gave the aggregated server's tokens; "
        f"KV moved over {result.path}"
    )
    if arguments.json:
        arguments.json.write_bytes(msgspec.json.format(msgspec.json.encode(result)))
    if not paths:
        console.print("[bold red]no KV cache was moved: decode computed everything itself[/]")
        return 1
    return 0 if identical == len(rows) else 1


def main() -> int:
    """Parse the command line, and end in order whatever happens."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
    parser.add_argument("--transport", choices=("auto", "tcp", "shm"), default="auto")
    parser.add_argument("--model", type=Path, required=True, help="folder of the tiny model")
    parser.add_argument("--logs", type=Path, required=True, help="folder for the servers' logs")
    arguments = parser.parse_args()
    end_like_ctrl_c()
    console = Console(width=None if sys.stdout.isatty() else 110)
    try:
        return run(arguments, console)
    except ServerFailed as failed:
        console.print(str(failed), markup=False, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("stopped; every server has ended")
        return 130


if __name__ == "__main__":
    sys.exit(main())
