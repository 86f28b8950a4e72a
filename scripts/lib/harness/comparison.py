"""One prompt sent two ways: to an aggregated server, and through a prefill/decode pair."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

import msgspec
from rich.table import Table

from harness.completions import token_prompt
from harness.servers import Server
from harness.transfers import Transfers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from harness.completions import Reply

TOKENS = 24  # per prompt: enough for a wrong page to show
SHARED_PREFIX = 256  # four pages of 64; the second prompt moves only what decode lacks
SUFFIXES = (20, 44)


class Ask(Protocol):
    """A streaming client, as `completions.complete` or `completions.generate`."""

    def __call__(self, url: str, prompt: list[int], /, *, max_tokens: int) -> Reply:
        """One greedy reply."""


class Stage(msgspec.Struct, frozen=True):
    """Servers that are up.

    Attributes:
        aggregated: One that does both halves by itself, so its tokens are right.
        decode: The pair's second half, which says what was moved.
        router: What stands before the pair.
        ask: How requests of this framework are sent.
        counted_within_s: How much later than the reply the decode server's metrics count it.
    """

    aggregated: Server
    decode: Server
    router: Server
    ask: Ask
    counted_within_s: float = 0.0


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


def wait_ready(servers: Sequence[Server], began: float, console: Console) -> None:
    """Wait for servers that were started at `began`, a monotonic second; shows where one is."""
    for server in servers:
        with console.status(f"{server.name}: starting (up to 400 s); log: {server.log}"):
            server.wait_ready()
        console.print(f"{server.name} is ready after {time.monotonic() - began:.0f} s")


def prompts(lengths: Sequence[int]) -> dict[str, list[int]]:
    """Name -> token ids: one prompt of each length, then two that begin alike."""
    named = {f"length {length}": token_prompt(length, seed=length) for length in lengths}
    prefix = token_prompt(SHARED_PREFIX, seed=0)
    for suffix in SUFFIXES:
        named[f"{SHARED_PREFIX} shared + {suffix}"] = prefix + token_prompt(suffix, seed=-suffix)
    return named


def compare(stage: Stage, name: str, prompt: list[int], tokens: int = TOKENS) -> Row:
    """Send one prompt both ways; nobody else may send any meanwhile."""
    here = stage.ask(stage.aggregated.url, prompt, max_tokens=tokens)
    before = Transfers.of(stage.decode.url)
    there = stage.ask(stage.router.url, prompt, max_tokens=tokens)
    moved = Transfers.gained(stage.decode.url, before, within_s=stage.counted_within_s)
    return Row(
        prompt=name,
        tokens=len(here.tokens),
        equal=here.tokens == there.tokens and len(here.tokens) == tokens,
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


def table(rows: Sequence[Row]) -> Table:
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
