"""Which pages a request gets in a cache that has served for a while. Pure.

Right after start-up a block pool hands out 1, 2, 3, ..., which is one run of memory to any engine;
a shuffle is the other extreme. This is vLLM's pool instead: a queue of free pages, taken at its
head, returned at its tail, a request's last page first. SGLang's works alike.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Requests that came and went before the one that is measured.
REQUESTS = 1000
#: Tokens that a running request generates while the next one arrives.
TOKENS_A_STEP = 64
#: A request stays for one to this many arrivals: four or five run at a time.
LONGEST_STAY = 8


def pages_after_churn(
    capacity: int, wanted: int, page_size: int, seed: int, *, generates: bool
) -> NDArray[np.uint64]:
    """Ids of `wanted` pages, in the request's order.

    Args:
        capacity: Pages of the cache; page 0 is never handed out, as in vLLM.
        wanted: Pages of the request, fewer than `capacity`. The requests before it had as many on
            average, from none to four times that, exponentially distributed.
        page_size: Tokens per page.
        seed: Of the lengths and stays.
        generates: On decode running requests take a page now and then, in turns; on prefill
            they only stay.
    """
    random = np.random.default_rng(seed)
    lengths = np.minimum(random.exponential(wanted, REQUESTS), min(4 * wanted, capacity - 1))
    stays = random.integers(1, LONGEST_STAY, REQUESTS, endpoint=True)
    free = deque(range(1, capacity))
    running: deque[_Request] = deque()
    for number, (length, stay) in enumerate(zip(lengths, stays, strict=True)):
        new = _Request(int(number + stay))
        _make_room(free, running, int(length))
        running.append(new)
        new.pages += [free.popleft() for _ in range(int(length))]
        if generates:
            _generate(free, running, _pages_due(number, page_size))
        for request in [one for one in running if one.leaves <= number]:
            running.remove(request)
            free.extend(reversed(request.pages))
    _make_room(free, running, wanted)
    return np.array([free.popleft() for _ in range(wanted)], np.uint64)


class _Request:
    def __init__(self, leaves: int) -> None:
        self.leaves = leaves
        self.pages: list[int] = []


def _make_room(free: deque[int], running: deque[_Request], pages: int) -> None:
    """End the oldest requests until so many pages are free."""
    while len(free) < pages:
        free.extend(reversed(running.popleft().pages))


def _pages_due(step: int, page_size: int) -> int:
    """Pages that a request fills in this step; pages above 64 tokens are filled in several."""
    return (step + 1) * TOKENS_A_STEP // page_size - step * TOKENS_A_STEP // page_size


def _generate(free: deque[int], running: deque[_Request], pages: int) -> None:
    for _ in range(pages):
        for request in running:
            if free:
                request.pages.append(free.popleft())
