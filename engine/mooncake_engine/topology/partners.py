"""Which measured pairs serve a transfer between two memory locations. Pure."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

from mooncake_engine.topology.priority import nics_for

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mooncake_engine.topology.priority import Matrix
    from mooncake_engine.topology.rails import RailTable


class Side(NamedTuple):
    """One engine's NICs.

    Attributes:
        numas: Name of each NIC in use -> its NUMA node, -1 when unknown, in the order of its keys.
        rows: Its priority matrix.
    """

    numas: Mapping[str, int]
    rows: Matrix

    def numa_of(self, location: str) -> int:
        """NUMA node of the NICs near to a location; -1 when they are on several or unknown."""
        near = {self.numas.get(name, -1) for name in nics_for(self.rows, location).preferred}
        return near.pop() if len(near) == 1 else -1


def partners(
    table: RailTable, ours: Side, theirs: Side, peer: str = ""
) -> dict[tuple[str, str], tuple[tuple[int, int], ...]]:
    """(Our location, the peer's) -> pairs of places in `numas` of both sides, best first.

    The file says which of the peer's NICs goes best with each of ours; which of ours are near to
    the memory says the matrix, so of the file's pairs only those of near NICs are taken. Locations
    between which nothing was measured are left out.

    Args:
        table: From `load_rails`.
        ours: Our side.
        theirs: The peer's.
        peer: Its host, as `host_of` gives it.
    """
    our_place = {name: place for place, name in enumerate(ours.numas)}
    their_place = {name: place for place, name in enumerate(theirs.numas)}
    found: dict[tuple[str, str], tuple[tuple[int, int], ...]] = {}
    for here, there in itertools.product({*ours.rows, "cpu"}, {*theirs.rows, "cpu"}):
        near = nics_for(ours.rows, here).preferred
        pairs = tuple(
            (our_place[local], their_place[remote])
            for local, remote in table.best(ours.numa_of(here), theirs.numa_of(there), peer)
            if local in near and local in our_place and remote in their_place
        )
        if pairs:
            found[here, there] = pairs
    return found
