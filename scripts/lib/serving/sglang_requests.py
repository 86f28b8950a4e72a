"""Single requests to SGLang's servers, as `Running.ask` and `Running.hand` want them.

SGLang's two legs are the same request, sent to both servers at once; a room number pairs them up.
Prefill answers when its pages have been taken away, and decode's first token is prefill's, passed
on without a step of decode's own: so the gap between the two answers says little here. What a user
waits longer than on one server, `Exchange.first_token - Exchange.sent` less that server's TTFT, is
what the transfer costs.
"""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from harness.completions import generate

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


def handing(prefill: str, bootstrap_port: int, decode: str) -> Hand:
    """Requests to one pair, both legs from here."""

    def hand(prompt: list[int], tokens: int) -> Exchange:
        pair: dict[str, Any] = {
            "bootstrap_host": urlsplit(prefill).hostname,
            "bootstrap_port": bootstrap_port,
            "bootstrap_room": _ROOMS.randrange(1, 2**62),  # 0 would be none
        }

        def leg(url: str) -> tuple[Reply, float, float]:
            begun = time.monotonic()
            reply = generate(url, prompt, max_tokens=tokens, timeout_s=TIMEOUT_S, **pair)
            return reply, begun, time.monotonic()

        with ThreadPoolExecutor(2) as legs:
            sent = time.monotonic()
            first, second = legs.submit(leg, prefill), legs.submit(leg, decode)
            _, _, answered = first.result()
            reply, begun, _ = second.result()
        return Exchange(
            sent=sent,
            prefill_answered=answered,
            first_token=begun + reply.ttft_s,
            tokens=reply.tokens,
        )

    return hand
