"""How much of a transfer is hidden behind a chunked prefill, on SGLang.

Exposed is what SGLang itself says: prefill's stage behind the last chunk, until decode had released
the pages. It holds a poll of each scheduler and the row of metadata besides.

There are two prompts of three chunks, one whose last chunk is short; with a single page, its
computation would be too short to hide the second chunk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from serving.overlap import Overlap, taken
from serving.setup import PAGE_SIZE
from serving.sglang_servers import Plan, pair

if TYPE_CHECKING:
    from serving.setup import Place

CHUNK = 21 * PAGE_SIZE
PROMPTS = {
    "3 equal chunks": 3 * CHUNK,
    "2 chunks and 4 pages": 2 * CHUNK + 4 * PAGE_SIZE,
}


def measure(place: Place, protocol: str = "tcp") -> list[Overlap]:
    """Start a pair of ours with small chunks and send it one request at a time.

    Raises:
        SetupFailed: It does not start.
    """
    with pair(place, Plan(protocol=protocol, chunk=CHUNK)) as running:
        return [
            taken(name, tokens, CHUNK, running.timers, lambda prompt: running.ask(prompt, 2))
            for name, tokens in PROMPTS.items()
        ]
