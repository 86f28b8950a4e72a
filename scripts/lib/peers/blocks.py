"""Which blocks are moved: scattered as a cache that has served for a while has them. Pure."""

from __future__ import annotations

import numpy as np

from mooncake_connector.bench.base import Transfer

KIB, MIB = 1 << 10, 1 << 20
#: Blocks of a list that lie in runs of 2 to 8 on both sides; the others lie alone.
IN_RUNS = 0.5


def scattered(op: str, count: int, size: int, seed: int = 7) -> Transfer:
    """`count` blocks out of twice as many places, in random order, some in runs on both sides."""
    random = np.random.default_rng(seed)
    runs = _run_lengths(count, random)
    local, remote = (_places(runs, 2 * count, random) for _ in range(2))
    lengths = np.full(count, size, np.uint64)
    return Transfer(op, local * np.uint64(size), remote * np.uint64(size), lengths)


def apart(op: str, count: int, size: int, seed: int = 7) -> Transfer:
    """`count` blocks in random order, none beside another: every second place."""
    random = np.random.default_rng(seed)
    local, remote = (2 * random.permutation(count).astype(np.uint64) for _ in range(2))
    lengths = np.full(count, size, np.uint64)
    return Transfer(op, local * np.uint64(size), remote * np.uint64(size), lengths)


def _run_lengths(count: int, random: np.random.Generator) -> np.ndarray:
    """Blocks of each run, in the list's order; their sum is `count`."""
    lengths = []
    left = int(count * IN_RUNS)
    while left >= 2:
        lengths.append(min(int(random.integers(2, 8, endpoint=True)), left))
        left -= lengths[-1]
    lengths += [1] * (count - sum(lengths))
    return random.permutation(np.array(lengths))


def _places(runs: np.ndarray, places: int, random: np.random.Generator) -> np.ndarray:
    """The place of each block of each run: runs in any order, gaps of any width before them."""
    order = random.permutation(runs.size)
    free = places - int(runs.sum())
    gaps = random.multinomial(free, np.full(runs.size + 1, 1 / (runs.size + 1)))[:-1]
    before = np.cumsum(runs[order]) - runs[order]  # blocks of the runs that lie lower
    first = np.empty(runs.size, np.int64)
    first[order] = before + np.cumsum(gaps)
    starts = np.cumsum(runs) - runs
    return (np.repeat(first - starts, runs) + np.arange(int(runs.sum()))).astype(np.uint64)
