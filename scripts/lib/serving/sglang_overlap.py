"""How much of a transfer is hidden behind a chunked prefill, on SGLang.

Decode reads a chunk's pages while prefill computes the next one, so a request waits only for what
is left when its last chunk has been computed. Both are in the servers' own metrics: all that the
reads took, from submit to last byte, and what prefill waited for after the last chunk, until decode
had released the pages. The second holds a poll of each scheduler and the row of metadata besides.

The last chunk is never hidden behind another one: of three equal ones no engine can hide more than
two thirds. So there are two prompts of three chunks, one whose last chunk is short; with a single
page, its computation would be too short to hide the second chunk.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import msgspec
from harness.completions import token_prompt
from rich.table import Table

from serving.setup import PAGE_SIZE
from serving.sglang_servers import Plan, pair

if TYPE_CHECKING:
    from collections.abc import Sequence

    from serving.setup import Place, Running

CHUNK = 21 * PAGE_SIZE
PROMPTS = {
    "3 equal chunks": 3 * CHUNK,
    "2 chunks and 4 pages": 2 * CHUNK + 4 * PAGE_SIZE,
}
REQUESTS = 5  # of each


class Overlap(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt's medians over its requests; milliseconds.

    Attributes:
        prompt: Which one.
        tokens: Its length.
        last_chunk: The part of its KV that no prefill can hide.
        transfer_ms: What reading it took, in sum over its chunks.
        exposed_ms: Of waiting for it behind the last chunk.
    """

    prompt: str
    tokens: int
    last_chunk: float
    transfer_ms: float
    exposed_ms: float

    @property
    def hidden(self) -> float:
        """The part of the transfer that cost the request nothing; below 0: waiting cost more."""
        return 1 - self.exposed_ms / self.transfer_ms


def measure(place: Place, protocol: str = "tcp") -> list[Overlap]:
    """Start a pair of ours with small chunks and send it one request at a time.

    Raises:
        SetupFailed: It does not start.
    """
    with pair(place, Plan(protocol=protocol, chunk=CHUNK)) as running:
        return [_of(running, name, tokens) for name, tokens in PROMPTS.items()]


def _of(running: Running, name: str, tokens: int) -> Overlap:
    taken = []
    for number in range(REQUESTS):
        before = running.timers()
        running.ask(token_prompt(tokens, seed=tokens * REQUESTS + number), 2)
        after = running.timers()
        taken.append({key: value - before[key] for key, value in after.items()})
    last = (tokens - 1) % CHUNK + 1
    return Overlap(
        prompt=name,
        tokens=tokens,
        last_chunk=last / tokens,
        transfer_ms=1e3 * statistics.median(each["seconds"] for each in taken),
        exposed_ms=1e3 * statistics.median(each["exposed_seconds"] for each in taken),
    )


def table(rows: Sequence[Overlap]) -> Table:
    """What the terminal shows."""
    shown = Table("prompt", caption="medians, milliseconds; ours over tcp, both legs at once")
    for heading in ("tokens", "last chunk", "transfer", "exposed", "hidden"):
        shown.add_column(heading, justify="right")
    for row in rows:
        shown.add_row(
            row.prompt,
            str(row.tokens),
            f"{row.last_chunk:.0%}",
            f"{row.transfer_ms:.1f}",
            f"{row.exposed_ms:.1f}",
            f"{row.hidden:.0%}",
        )
    return shown
