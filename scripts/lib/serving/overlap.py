"""How much of a transfer is hidden behind a chunked prefill: what both frameworks share.

Both times are in the servers' own metrics: all that the reads took, from submit to last byte, and
what a request waited for when its last chunk had been computed. The last chunk is never hidden
behind another one, so of three equal ones no engine can hide more than two thirds.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import msgspec
from harness.completions import token_prompt
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from serving.setup import Timers

REQUESTS = 5  # of each prompt


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


def taken(
    name: str, tokens: int, chunk: int, timers: Timers, send: Callable[[list[int]], object]
) -> Overlap:
    """Send requests of one length, one at a time, and say what the servers counted.

    Args:
        name: The prompt's.
        tokens: Its length.
        chunk: Of the prefill server, in tokens.
        timers: Totals that have settled: "seconds" and "exposed_seconds".
        send: Sends a prompt to a pair, both legs at once.
    """
    gained = []
    for number in range(REQUESTS):
        before = timers()
        send(token_prompt(tokens, seed=-tokens * REQUESTS - number))
        after = timers()
        gained.append({key: value - before[key] for key, value in after.items()})
    return Overlap(
        prompt=name,
        tokens=tokens,
        last_chunk=((tokens - 1) % chunk + 1) / tokens,
        transfer_ms=1e3 * statistics.median(each["seconds"] for each in gained),
        exposed_ms=1e3 * statistics.median(each["exposed_seconds"] for each in gained),
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
