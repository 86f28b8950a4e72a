"""What the benchmark's tests measure: small transfers, and the pairs that move them."""

from __future__ import annotations

import numpy as np

from mooncake_connector.bench.backends import ours
from mooncake_connector.bench.base import Route, Transfer, Variant

PIECE = 4096
BUFFER = 64 * PIECE


def scattered(op: str, pieces: int, thread: int = 0, seed: int = 0) -> Transfer:
    """Pieces of two lengths in random places of a thread's quarter of the buffers."""
    random = np.random.default_rng(seed + thread)
    local, remote = (
        (random.permutation(16)[:pieces] + thread * 16).astype(np.uint64) * np.uint64(PIECE)
        for _ in range(2)
    )
    lengths = np.full(pieces, PIECE, np.uint64)
    lengths[::3] = 1000
    return Transfer(op, local, remote, lengths)


def ours_over(route: Route, **environment: str) -> Variant:
    """Our engine's defaults."""
    variant = ours.variants(route)[0]
    return Variant(
        backend=variant.backend,
        name=variant.name,
        route=route,
        options=variant.options,
        environment=environment,
    )
