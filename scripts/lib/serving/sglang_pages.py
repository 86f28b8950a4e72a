"""Page size 1 against 64 under load, with long answers: where a peer's throughput once collapsed.

With pages of one token, whose places in the pool are scattered once requests of many lengths have
come and gone, a prompt's KV is thousands of small pieces. SGLang's users saw Mooncake's throughput
fall from 130 to 70 MB/s from a first run to a second, and P99 TTFT rise from 2 to 12 s, with
answers of 512 tokens; `--page-size 64` was the advice. Here both engines meet both page sizes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from typing import TYPE_CHECKING

import msgspec
from harness.completions import CompletionFailed, token_prompt
from harness.process import ServerFailed
from rich.table import Table

from serving.setup import Load, LoadFigures, SetupFailed
from serving.sglang_servers import STOCK, Plan, pair

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from serving.setup import Place, Running

PAGE_SIZES = (64, 1)
RUNS = 2
OUTPUT_TOKENS = 512
SINGLE = 5  # requests after each load
ENGINES = {"ours, tcp": Plan(protocol="tcp"), STOCK: Plan(backend=STOCK)}


class Pages(msgspec.Struct, frozen=True, kw_only=True):
    """One run of the load; `error` in place of the rest where servers did not start, or failed.

    Attributes:
        engine: Ours or the peer's.
        page_size: Tokens.
        run: 1, 2, ...
        load: What the benchmark said.
        handover_ms: Of single requests right after the load, in the pools it left behind: under
            load, a finished transfer is noticed only when the prefill that runs has ended.
        gb_s: Their KV over their handover.
        pieces: Runs of memory a request, before and after neighbours were merged; ours only.
        merged: Ditto, after.
        error: What was tried and printed.
    """

    engine: str
    page_size: int
    run: int = 0
    load: LoadFigures | None = None
    handover_ms: float = 0.0
    gb_s: float = 0.0
    pieces: float = 0.0
    merged: float = 0.0
    error: str = ""


def loads(requests: int = 8, rate: float = 1.0, input_tokens: int = 1024) -> list[Load]:
    """What each pair meets, one after the other; new prompts each time."""
    return [
        Load(
            requests=requests,
            rate=rate,
            input_tokens=input_tokens,
            output_tokens=OUTPUT_TOKENS,
            seed=run,
        )
        for run in range(1, RUNS + 1)
    ]


def measure(place: Place, runs: Sequence[Load]) -> list[Pages]:
    """Both engines at a time, in turns, first with one page size and then with the other."""
    rows: list[Pages] = []
    for page_size in PAGE_SIZES:
        with contextlib.ExitStack() as opened:
            up: dict[str, Running] = {}
            for engine, plan in ENGINES.items():
                logs = place.logs / f"{plan.backend}-page-{page_size}"
                sized = dataclasses.replace(plan, page_size=page_size)
                try:
                    running = opened.enter_context(
                        pair(dataclasses.replace(place, logs=logs), sized)
                    )
                except SetupFailed as failed:
                    rows.append(Pages(engine=engine, page_size=page_size, error=str(failed)))
                else:
                    up[engine] = running
            for run, load in enumerate(runs, 1):
                for engine, running in up.items():
                    with place.console.status(f"{engine}, page size {page_size}, run {run}"):
                        file = place.logs / f"{engine.split(',')[0]}-page-{page_size}-run-{run}"
                        row = Pages(engine=engine, page_size=page_size, run=run)
                        rows.append(one(running, load, file, row))
    return rows


def one(running: Running, load: Load, file: Path, row: Pages) -> Pages:
    """Give one pair the load, then single requests; `row` with what came of it."""
    assert running.hand is not None, "a pair hands over"
    try:
        figures = running.load(load, file)
        before = running.timers()
        handover_s = statistics.median(
            running.hand(
                token_prompt(load.input_tokens, seed=-load.seed * SINGLE - number), 2
            ).gap_s
            for number in range(SINGLE)
        )
        gained = {key: value - before[key] for key, value in running.timers().items()}
    except (
        ServerFailed,
        CompletionFailed,
        OSError,
    ) as failed:  # a collapse may be so deep that requests time out
        return msgspec.structs.replace(row, error=str(failed))
    return msgspec.structs.replace(
        row,
        load=figures,
        handover_ms=handover_s * 1e3,
        gb_s=gained["bytes"] / SINGLE / handover_s / 1e9,
        pieces=gained.get("descriptors", 0) / SINGLE,
        merged=gained.get("runs", 0) / SINGLE,
    )


def table(rows: Sequence[Pages]) -> Table:
    """What the terminal shows; why one failed is in the JSON."""
    shown = Table(caption=f"{OUTPUT_TOKENS} tokens generated; latencies in milliseconds")
    for heading in ("engine", "page size", "run", "tokens/s", "TTFT mean/P99", "ITL mean/P99"):
        shown.add_column(heading, justify="left" if heading == "engine" else "right")
    shown.add_column("handover after it", justify="right")
    shown.add_column("KV GB/s", justify="right")
    shown.add_column("pieces a request", justify="right")
    for row in rows:
        start = [row.engine, str(row.page_size)]
        if row.load is None:
            shown.add_row(*start, str(row.run) if row.run else "-", "failed")
            continue
        ttft, itl = row.load.ttft, row.load.itl
        shown.add_row(
            *start,
            str(row.run),
            f"{row.load.output_tokens_s:.1f}",
            f"{ttft.mean:.0f} / {ttft.p99:.0f}",
            f"{itl.mean:.1f} / {itl.p99:.1f}",
            f"{row.handover_ms:.1f}",
            f"{row.gb_s:.2f}",
            f"{row.pieces:.0f} -> {row.merged:.0f}" if row.pieces else "",
        )
    return shown
