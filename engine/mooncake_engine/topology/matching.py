"""Chooses pairs of NICs from what was measured. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mooncake_engine.topology.sysfs import natural_order

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from mooncake_engine.topology.rails import Measured

_NEVER = 1e12  # us; a thousand times what is not measured, and sums of it keep their microseconds


def matchings(endpoints: Sequence[Measured]) -> dict[str, tuple[Measured, ...]]:
    """The `partition_matchings` of what was measured.

    Per pair of NUMA nodes: each NIC in one pair at most, as many pairs as can be, and of those the
    ones in which the sum of `piece_us` is smallest (greed would end with what nobody wanted). Our
    NICs that are left over, where the peer has fewer, are matched again under "..._extra".
    """
    by_nodes: dict[str, list[Measured]] = {}
    for pair in endpoints:
        by_nodes.setdefault(f"{pair.src_numa}-{pair.dst_numa}", []).append(pair)
    result: dict[str, tuple[Measured, ...]] = {}
    for key, pairs in sorted(by_nodes.items()):
        result[key] = _matching(pairs)
        extra: list[Measured] = []
        while True:
            taken = {pair.src_dev for pair in (*result[key], *extra)}
            left = [pair for pair in pairs if pair.src_dev not in taken]
            if not left:
                break
            extra += _matching(left)
        if extra:
            result[f"{key}_extra"] = tuple(extra)
    return result


def _matching(pairs: Sequence[Measured]) -> tuple[Measured, ...]:
    ours = sorted({pair.src_dev for pair in pairs}, key=natural_order)
    theirs = sorted({pair.dst_dev for pair in pairs}, key=natural_order)
    if len(ours) > len(theirs):  # `_assign` wants a column for every row
        rows, columns = theirs, ours
        at = {(rows.index(p.dst_dev), columns.index(p.src_dev)): p for p in pairs}
    else:
        rows, columns = ours, theirs
        at = {(rows.index(p.src_dev), columns.index(p.dst_dev)): p for p in pairs}
    cost = np.full((len(rows), len(columns)), _NEVER)
    for (row, column), pair in at.items():
        cost[row, column] = pair.piece_us()
    chosen = enumerate(_assign(cost).tolist())
    found = [at[place] for place in chosen if place in at]  # the others were never measured
    return tuple(sorted(found, key=lambda pair: natural_order(pair.src_dev)))


def _assign(cost: NDArray[np.float64]) -> NDArray[np.intp]:
    """The column of each row so that the sum is least: the Hungarian method, O(rows^2 * columns).

    Rows are added one by one, each by a shortest augmenting path under the potentials `u`, `v`.
    Index 0 of rows and columns is the place where the search starts; there are no more columns
    than NICs in a host, so that no library is worth its weight.
    """
    rows, columns = cost.shape
    u, v = np.zeros(rows + 1), np.zeros(columns + 1)
    row_of = np.zeros(columns + 1, dtype=np.intp)  # 0: the column is free
    came_from = np.zeros(columns + 1, dtype=np.intp)
    for row in range(1, rows + 1):
        row_of[0], column = row, 0
        least = np.full(columns + 1, np.inf)
        used = np.zeros(columns + 1, dtype=np.bool_)
        while row_of[column]:
            used[column] = True
            reduced = np.concatenate(([np.inf], cost[row_of[column] - 1])) - u[row_of[column]] - v
            better = ~used & (reduced < least)
            least[better], came_from[better] = reduced[better], column
            nearest = int(np.argmin(np.where(used, np.inf, least)))
            step = least[nearest]
            u[row_of[used]] += step
            v[used] -= step
            least[~used] -= step
            column = nearest
        while column:
            row_of[column] = row_of[came_from[column]]
            column = int(came_from[column])
    result = np.zeros(rows, dtype=np.intp)
    taken = np.flatnonzero(row_of[1:])
    result[row_of[1:][taken] - 1] = taken
    return result
