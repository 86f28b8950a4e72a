"""How much of a transfer is hidden behind a chunked prefill, on vLLM.

Exposed is what our prefill server counts: from its last page computed to all of it taken by decode.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from serving.overlap import Overlap, taken
from serving.setup import PAGE_SIZE, settled
from serving.vllm_servers import CHUNK_TOKENS

if TYPE_CHECKING:
    from serving.setup import Running

PROMPTS = {
    "2 chunks and 4 pages": 2 * CHUNK_TOKENS + 4 * PAGE_SIZE,
    "2 2/3 chunks": 4096,
}


def measure(running: Running) -> list[Overlap]:
    """One request at a time to a pair that can do both at once."""
    both = running.hand_at_once
    assert both is not None, "asked of set-ups that can"
    timers = partial(settled, running.timers)
    return [
        taken(name, tokens, CHUNK_TOKENS, timers, lambda prompt: both(prompt, 2))
        for name, tokens in PROMPTS.items()
    ]
