"""What each row of the table moves: the options' rows, and each thread's transfers. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np

from mooncake_connector.bench.base import Transfer
from mooncake_connector.bench.kv import Request, kv_transfer
from mooncake_connector.bench.sweep import Row, sweep

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mooncake_connector.bench.options import Options

#: What each thread goes through, again and again.
Work = tuple[tuple[Transfer, ...], ...]


class Case(NamedTuple):
    """One row, and what to run for it; no work: it is skipped."""

    workload: str
    row: Row
    work: Work


def cases(options: Options) -> Iterator[Case]:
    """Every row of the options' workload, one at a time: a large one takes a second to make.

    Raises:
        ConfigError: A request does not fit into the buffer.
    """
    if options.workload == "sweep":
        yield from _sweep(options)
    else:
        for page_size in options.page_sizes:
            yield _request(options, page_size)


def scattered(
    row: Row, op: str, buffer: int, seed: int, *, contiguous: bool = False
) -> tuple[Transfer, ...]:
    """One transfer for each thread, none of whose blocks overlaps another's.

    Blocks lie in any order on either side, in every second place of as much buffer as that takes
    (with less, closer), so that an engine which merges neighbours finds few; `contiguous` puts
    each batch in one piece on both sides, as tebench does.
    """
    count = row.batch * row.threads
    places = min(buffer // row.block, 2 * count)
    random = np.random.default_rng(seed)
    local, remote = (
        np.arange(count) if contiguous else random.permutation(places)[:count] for _ in range(2)
    )
    lengths = np.full(row.batch, row.block, np.uint64)
    return tuple(
        Transfer(op, ours.astype(np.uint64) * row.block, its.astype(np.uint64) * row.block, lengths)
        for ours, its in zip(
            local.reshape(row.threads, -1), remote.reshape(row.threads, -1), strict=True
        )
    )


def _sweep(options: Options) -> Iterator[Case]:
    for row in sweep(options.blocks, options.batches, options.threads, options.buffer):
        if row.skipped:
            yield Case("sweep", row, ())
            continue
        moved = scattered(row, "read", options.buffer, options.seed, contiguous=options.contiguous)
        yield Case("sweep", row, tuple(_with_ops(one, options.op) for one in moved))


def _request(options: Options, page_size: int) -> Case:
    request = Request(
        options.model, options.tokens, page_size, options.tp_size, options.arrangement
    )
    moved = kv_transfer(
        request, "write" if options.op == "write" else "read", options.buffer, options.seed
    )
    row = Row(block=int(moved.lengths[0]), batch=len(moved.lengths), threads=1)
    name = f"{options.model}, {options.tokens} tokens, page {page_size}"
    return Case(name, row, (_with_ops(moved, options.op),))


def _with_ops(transfer: Transfer, op: str) -> tuple[Transfer, ...]:
    """Mix is a read and a write of the same blocks, in turns."""
    ops = ("read", "write") if op == "mix" else (op,)
    return tuple(msgspec.structs.replace(transfer, op=one) for one in ops)
