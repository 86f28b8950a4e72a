"""One request from both servers' routers to its end, for tests of what it leaves where."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sglang_ranks import RankProcess, Server

#: Pages of a prompt, in no order, on prefill and on decode.
THEIRS, OWN = (20, 4, 11, 12), (1, 2, 3, 7)
#: Rows of metadata there and here.
THEIR_ROW, OWN_ROW = 3, 5
ORDER = ["Bootstrapping", "WaitingForInput", "Transferring", "Success"]
KEPT = 170  # what decode's pages hold before a read


def begin(
    prefill: Sequence[RankProcess],
    decode: Sequence[RankProcess],
    address: str,
    name: str = "r",
    room: int = 7,
    *,
    theirs: Sequence[int] = THEIRS,
    own: Sequence[int] = OWN,
    **offer: Any,  # noqa: ANN401 - Offer's
) -> None:
    """What a router and both servers do until decode reads; returns at once."""
    for rank in prefill:
        rank.ask("offer", name, room, pages=theirs, aux=THEIR_ROW, **offer)
    for rank in decode:
        rank.ask("want", name, room, address)
        rank.ask("allocate", name, pages=own, aux=OWN_ROW)


def finish(
    prefill: Sequence[RankProcess], decode: Sequence[RankProcess], name: str = "r"
) -> list[list[str]]:
    """Wait for success everywhere and clear it, as schedulers do; statuses on prefill."""
    for rank in decode:
        rank.await_status(name, "Success")
    statuses = [rank.await_status(name, "Success") for rank in prefill]
    for rank in (*decode, *prefill):
        rank.ask("clear", name)
    return statuses


def transfer(prefill: Server, decode: Server, name: str = "r", room: int = 7) -> None:
    """A whole request between all ranks, with the bytes compared shard by shard."""
    begin(prefill.ranks, decode.ranks, prefill.address, name, room)
    finish(prefill.ranks, decode.ranks, name)
    assert decode.each("digests", OWN, []) == prefill.each("digests", THEIRS, [])
    assert decode.each("metadata", OWN_ROW) == prefill.each("metadata", THEIR_ROW)
