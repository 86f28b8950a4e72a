"""Single requests to SGLang's servers, as `Running.ask` and `Running.hand` want them.

SGLang's two legs are the same request, sent to both servers at once; a room number pairs them up.
Prefill answers only when its pages have been taken away, so its answer's arrival says nothing of
the handover; but it names the moment at which the prompt was computed, by this machine's clock.
Decode's first token is prefill's, passed on without a step of decode's own.
"""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from harness.completions import CompletionFailed, generate

from serving.setup import Exchange

if TYPE_CHECKING:
    from harness.completions import Reply

    from serving.setup import Ask, Hand

TIMEOUT_S = 300.0
_ROOMS = random.Random()  # noqa: S311 - a number that no other request has, not a secret


def asking(url: str) -> Ask:
    """Requests through `url`."""

    def ask(prompt: list[int], tokens: int) -> Reply:
        return generate(url, prompt, max_tokens=tokens, timeout_s=TIMEOUT_S)

    return ask


def handing(prefill: str, decode: str, bootstrap: str) -> Hand:
    """Requests to one pair, both legs from here; `bootstrap` is its bootstrap server's URL."""
    where = urlsplit(bootstrap)

    def hand(prompt: list[int], tokens: int) -> Exchange:
        pair: dict[str, Any] = {
            "bootstrap_host": where.hostname,
            "bootstrap_port": where.port,
            "bootstrap_room": _ROOMS.randrange(1, 2**62),  # 0 would be none
        }

        def leg(url: str) -> tuple[Reply, float]:
            begun = time.monotonic()
            return generate(url, prompt, max_tokens=tokens, timeout_s=TIMEOUT_S, **pair), begun

        with ThreadPoolExecutor(2) as legs:
            sent = time.monotonic()
            first, second = legs.submit(leg, prefill), legs.submit(leg, decode)
            prefilled, _ = first.result()
            reply, begun = second.result()
        return Exchange(
            sent=sent,
            prefill_answered=_computed(prefilled),
            first_token=begun + reply.ttft_s,
            tokens=reply.tokens,
            steps=0,
        )

    return hand


def _computed(prefilled: Reply) -> float:
    """When prefill had computed the prompt, as a monotonic second.

    Raises:
        CompletionFailed: It does not say, as a server without `--enable-metrics`.
    """
    said = prefilled.meta.get("prefill_finished_time")
    if not said:
        raise CompletionFailed(
            200, f"prefill's meta_info has no prefill_finished_time: {prefilled.meta}"
        )
    return float(said) - time.time() + time.monotonic()
