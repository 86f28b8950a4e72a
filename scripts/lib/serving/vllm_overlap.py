"""How much of a transfer is hidden behind a chunked prefill, on vLLM, both legs sent at once.

Exposed is the handover: decode's first token minus prefill's response, minus one decode step. It
holds two HTTP answers and a scheduler's step besides, which no transfer is to blame for. The whole
transfer is what our metrics count, submit to last byte, in sum over the chunks' batches.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from harness.completions import token_prompt

from serving.setup import PAGE_SIZE
from serving.sglang_overlap import Overlap
from serving.vllm_servers import CHUNK_TOKENS

if TYPE_CHECKING:
    from serving.setup import Running

#: No engine hides the last chunk behind a later one, so how long it is decides what can be hidden.
PROMPTS = {
    "2 chunks and 4 pages": 2 * CHUNK_TOKENS + 4 * PAGE_SIZE,
    "2 2/3 chunks": 4096,
}
REQUESTS = 5  # of each
TOKENS = 9


def measure(running: Running, reference: Running) -> list[Overlap]:
    """One request at a time to a pair that can do both at once, the same to the reference."""
    return [_of(running, reference, name, tokens) for name, tokens in PROMPTS.items()]


def _of(running: Running, reference: Running, name: str, tokens: int) -> Overlap:
    assert running.hand_at_once is not None, "asked of set-ups that can"
    seconds, exposed = [], []
    for number in range(REQUESTS):
        prompt = token_prompt(tokens, seed=-tokens * REQUESTS - number)
        step_s = reference.ask(prompt, TOKENS).itl_s
        before = running.timers()["seconds"]
        exposed.append(running.hand_at_once(prompt, TOKENS).handover_s(step_s))
        seconds.append(running.timers()["seconds"] - before)
    last = (tokens - 1) % CHUNK_TOKENS + 1
    return Overlap(
        prompt=name,
        tokens=tokens,
        last_chunk=last / tokens,
        transfer_ms=1e3 * statistics.median(seconds),
        exposed_ms=1e3 * statistics.median(exposed),
    )
