"""Which rows a sweep has: threads, block sizes and batch sizes, each by doubling. Pure."""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """One line of the table; with `skipped` set it is shown and not run."""

    block: int
    batch: int
    threads: int
    skipped: str = ""


def doubling(start: int, stop: int) -> list[int]:
    """`start`, twice that, ... up to `stop`."""
    values = []
    while start <= stop:
        values.append(start)
        start *= 2
    return values


def sweep(
    blocks: tuple[int, int], batches: tuple[int, int], threads: tuple[int, ...], buffer: int
) -> list[Row]:
    """All rows, threads outermost and batch size innermost, as tebench goes through them.

    Every thread moves a batch of its own, so a row needs block x batch x threads bytes of the
    buffer; a row that needs more is skipped.
    """
    rows = []
    for count in threads:
        for block in doubling(*blocks):
            for batch in doubling(*batches):
                needed = block * batch * count
                why = f"needs {needed} of {buffer} bytes" if needed > buffer else ""
                rows.append(Row(block, batch, count, why))
    return rows
