"""What is measured, and beside what load. Pure."""

from __future__ import annotations

import msgspec

from mooncake_connector.bench.base import Route, Transfer


class Condition(msgspec.Struct, frozen=True, kw_only=True):
    """What else runs, on purpose.

    Attributes:
        busy_python: A thread of pure Python in each side.
        busy_loops: Processes that each want a core.
    """

    busy_python: bool = False
    busy_loops: int = 0


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """One row of a table.

    Attributes:
        name: Unique in a run: "2048 x 128 KiB read".
        work: For each thread the transfers that it goes through in turn: one, or a read and a
            write by turns. Threads have parts of the buffers of their own.
        condition: Beside what load.
        routes: Only variants of these; empty: all.
    """

    name: str
    work: tuple[tuple[Transfer, ...], ...]
    condition: Condition = Condition()
    routes: tuple[Route, ...] = ()

    @property
    def buffer_bytes(self) -> int:
        """What each side's buffer must hold."""
        return max(
            int((offsets + transfer.lengths).max())
            for transfers in self.work
            for transfer in transfers
            for offsets in (transfer.local, transfer.remote)
        )

    @property
    def run_bytes(self) -> int:
        """Bytes of one run; the mean, where the transfers in turn differ."""
        sizes = [transfer.nbytes for transfers in self.work for transfer in transfers]
        return sum(sizes) // len(sizes)


def workload(
    name: str,
    transfer: Transfer,
    *,
    condition: Condition | None = None,
    routes: tuple[Route, ...] = (),
) -> Workload:
    """The simplest: one thread, one transfer."""
    return Workload(
        name=name, work=((transfer,),), condition=condition or Condition(), routes=routes
    )
