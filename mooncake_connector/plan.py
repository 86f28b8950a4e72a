"""Source layout x destination layout x page ids -> one list of transfers. Pure.

Pages are named by position in the request (0 is the first `page_size` tokens) and by id in each
side's block table; positions match the two sides, ids say where the bytes are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np

from mooncake_connector.layout import PieceTable

if TYPE_CHECKING:
    from mooncake_engine.types import Uint64s
    from msgspec import Struct

    from mooncake_connector.layout import CacheLayout, CacheSpec, GroupSpec


class PageRun(NamedTuple):
    """Pages of one group at positions `first`, `first + 1`, ..."""

    first: int
    ids: Uint64s

    @property
    def end(self) -> int:
        """Position behind the last page."""
        return self.first + len(self.ids)


class Transfers(NamedTuple):
    """What the engine's `submit` takes: run i moves lengths[i] bytes from remote[i] to local[i]."""

    local: Uint64s
    remote: Uint64s
    lengths: Uint64s

    @property
    def nbytes(self) -> int:
        """Bytes of all runs."""
        return int(self.lengths.sum())


EMPTY = Transfers(*(np.zeros(0, np.uint64) for _ in range(3)))


def overlap(wanted: PageRun, offered: PageRun) -> tuple[Uint64s, Uint64s]:
    """Ids (wanted side, offered side) of the positions that both have."""
    first, end = max(wanted.first, offered.first), min(wanted.end, offered.end)
    if first >= end:
        return EMPTY.local, EMPTY.local
    return (
        wanted.ids[first - wanted.first : end - wanted.first],
        offered.ids[first - offered.first : end - offered.first],
    )


def transfers(
    local: PieceTable, remote: PieceTable, local_pages: Uint64s, remote_pages: Uint64s
) -> Transfers:
    """Every byte of the remote pages to its place in the local pages, page i to page i.

    Runs go layer by layer and page by page, so neighbouring pages stay neighbours for the
    engine's merge.

    Raises:
        ValueError: When a page id lies outside a cache or the two caches' pieces differ.
    """
    if len(local_pages) != len(remote_pages):
        raise ValueError(f"{len(local_pages)} local pages for {len(remote_pages)} remote ones")
    if not len(local_pages) or not (len(local.base) or len(remote.base)):
        return EMPTY  # the latter: a pipeline stage may hold no layer of a group
    for whose, table, pages in (("local", local, local_pages), ("remote", remote, remote_pages)):
        if int(pages.max()) >= table.pages:
            raise ValueError(
                f"{whose} page id {int(pages.max())} is outside the cache of {table.pages} pages"
            )
    if not np.array_equal(local.nbytes, remote.nbytes):
        raise ValueError("the two caches cut their pages into different pieces")
    return Transfers(
        local.addresses(local_pages).ravel(),
        remote.addresses(remote_pages).ravel(),
        np.repeat(local.nbytes, len(local_pages)),
    )


def join(parts: list[Transfers]) -> Transfers:
    """One list from several groups' lists."""
    if len(parts) == 1:
        return parts[0]
    return Transfers(*(np.concatenate(column) for column in zip(EMPTY, *parts, strict=True)))


def differences(prefill: CacheSpec, decode: CacheSpec) -> list[str]:
    """Why the two caches cannot exchange pages; empty when they can. Names both values.

    Ranks and sizes must be equal, with two exceptions: a cache that every tensor-parallel rank
    holds whole (MLA) may be read from any of them, and one decode stage may read all of prefill's.
    """
    apart = set()  # fields that may differ
    if all(group.kind in ("mla", "metadata") for group in prefill.groups):
        apart |= {"tp_rank", "tp_size"}
    if one_reads_all_stages := decode.pp_size == 1 < prefill.pp_size:
        apart |= {"pp_rank", "pp_size"}
    found = _differing("", prefill, decode, apart | {"groups"})
    if len(prefill.groups) != len(decode.groups):
        found.append(
            f"groups: prefill has {len(prefill.groups)} KV cache groups, "
            f"decode has {len(decode.groups)}"
        )
    for index, (one, other) in enumerate(zip(prefill.groups, decode.groups, strict=False)):
        own = _part(other, one.layers) if one_reads_all_stages else other
        found += _differing(f"groups[{index}].", one, own, set())
    return found


def narrowed(layout: CacheLayout, own: CacheSpec, other: CacheSpec) -> list[PieceTable]:
    """Our pages, group by group, of the layers that `other` has, in its order.

    The two have no `differences`. All layers, unless `other` is one of several pipeline stages.
    """
    tables = []
    for layers, group, theirs in zip(layout.groups, own.groups, other.groups, strict=True):
        by_name = dict(zip(group.layers, layers, strict=True))
        tables.append(PieceTable([by_name[name] for name in theirs.layers]))
    return tables


def _part(group: GroupSpec, layers: tuple[str, ...]) -> GroupSpec:
    """The group with only these of its layers, in this order."""
    sizes = dict(zip(group.layers, group.page_bytes, strict=True))
    known = tuple(name for name in layers if name in sizes)
    return msgspec.structs.replace(
        group, layers=known, page_bytes=tuple(sizes[name] for name in known)
    )


def _differing(where: str, prefill: Struct, decode: Struct, leave_out: set[str]) -> list[str]:
    found = []
    for field in msgspec.structs.fields(type(prefill)):
        ours, theirs = getattr(prefill, field.name), getattr(decode, field.name)
        if field.name not in leave_out and ours != theirs:
            found.append(
                f"{where}{field.name}: prefill has {_short(ours)}, decode has {_short(theirs)}"
            )
    return found


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
