"""What the loops in C may touch and honour: kept up to date by the tables that own those facts."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from mooncake_engine.native import Library
    from mooncake_engine.types import Uint64s


def owned(holder: object, pointer: int | None, free: Callable[[int], object], what: str) -> int:
    """`pointer`, given back by `free` when `holder` is gone; `MemoryError` when there is none.

    Not at the interpreter's end: threads that nobody joined may be in the library until the very
    last.
    """
    if not pointer:
        raise MemoryError(f"no memory for {what}")
    weakref.finalize(holder, free, pointer).atexit = False
    return pointer


class RegionLedger:
    """The address ranges that may be touched. `RegionTable.follow` fills it."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self.pointer = owned(
            self, library.regions_new(), library.regions_free, "the table of regions"
        )

    def replace(self, starts: Uint64s, ends: Uint64s, gone: tuple[int, int] = (0, 0)) -> None:
        """Permit these sorted, disjoint ranges; who touches `gone` has left when this returns."""
        self._library.regions_replace(
            self.pointer, starts.tobytes(), ends.tobytes(), starts.size, *gone
        )


class GrantLedger:
    """The grants that are honoured. `GrantTable.follow` fills it."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self.pointer = owned(self, library.grants_new(), library.grants_free, "the table of grants")

    def add(self, grant: bytes) -> None:
        """Honour it from now on."""
        self._library.grants_add(self.pointer, grant, len(grant))

    def revoke(self, grant: bytes) -> None:
        """Honour it no more; who is served under it has left when this returns."""
        self._library.grants_revoke(self.pointer, grant, len(grant))
