"""A client that leaves: at every moment, on either side; nothing stays behind on both."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from node_stage import until
from sglang_flow import KEPT, OWN, OWN_ROW, THEIR_ROW, THEIRS, begin, finish, transfer

if TYPE_CHECKING:
    from sglang_ranks import RankProcess, Server, Servers

ABORTED = "Aborted by AbortReq."


def reach(moment: str, prefill: Server, decode: Server) -> None:
    """Bring request "r" to this moment."""
    [source], [reader] = prefill.ranks, decode.ranks
    chunks = {"computing": [2], "reading": None}.get(moment, [])
    if moment == "reading":
        reader.ask("hold_reads")
    if moment != "unoffered":
        source.ask("offer", "r", 7, pages=THEIRS, aux=THEIR_ROW, chunks=chunks)
    if moment == "unclaimed":
        return
    reader.ask("want", "r", 7, prefill.address)
    reader.await_status("r", "WaitingForInput")
    if moment == "claimed":
        until(lambda: source.ask("hold_of", 7)["claims"] == 1, "the claim")
    elif moment != "unoffered":
        reader.ask("allocate", "r", pages=OWN, aux=OWN_ROW)
        status = "Transferring" if moment == "reading" else "WaitingForInput"
        source.await_status("r", status)
        if moment == "reading":
            reader.await_read()


def end(rank: RankProcess) -> str:
    """As a scheduler ends a failed request, and once more; the reason."""
    rank.await_status("r", "Failed")
    reason = str(rank.ask("fail", "r")["reason"])
    rank.ask("clear", "r")
    rank.ask("clear", "r")
    return reason


def assert_all_is_well(prefill: Server, decode: Server) -> None:
    decode.each("release_reads")
    for server in (decode, prefill):
        server.assert_nothing_is_left()
    transfer(prefill, decode, "next", 8)


@pytest.mark.parametrize("moment", ["claimed", "subscribed", "computing", "reading"])
def test_decode_hears_of_an_abort_on_prefill(servers: Servers, moment: str) -> None:
    prefill, decode = servers.make("prefill"), servers.make("decode")
    [source], [reader] = prefill.ranks, decode.ranks
    reach(moment, prefill, decode)
    source.ask("abort", "r")
    assert end(source) == ABORTED
    if moment == "claimed":  # it hears when it asks
        reader.ask("allocate", "r", pages=OWN, aux=OWN_ROW)
    assert end(reader) == f"prefill gave it up: {ABORTED}"
    until(lambda: reader.ask("safe", 7), "its read to end")
    assert_all_is_well(prefill, decode)


@pytest.mark.parametrize("moment", ["claimed", "subscribed", "computing", "reading"])
def test_prefill_hears_of_an_abort_on_decode(servers: Servers, moment: str) -> None:
    prefill, decode = servers.make("prefill"), servers.make("decode")
    [source], [reader] = prefill.ranks, decode.ranks
    reach(moment, prefill, decode)
    reader.ask("abort", "r")
    assert end(reader) == ABORTED
    until(lambda: reader.ask("safe", 7), "its read to end")
    assert end(source) == "decode gave it up"
    assert_all_is_well(prefill, decode)


def test_an_abort_on_prefill_before_decode_came_leaves_nothing(servers: Servers) -> None:
    prefill, decode = servers.make("prefill"), servers.make("decode")
    reach("unclaimed", prefill, decode)
    prefill.ranks[0].ask("abort", "r")
    assert end(prefill.ranks[0]) == ABORTED
    assert_all_is_well(prefill, decode)


def test_an_abort_on_decode_before_prefill_came_ends_prefills_request(servers: Servers) -> None:
    prefill, decode = servers.make("prefill"), servers.make("decode")
    [source], [reader] = prefill.ranks, decode.ranks
    reach("unoffered", prefill, decode)
    reader.ask("abort", "r")
    assert end(reader) == ABORTED
    source.ask("offer", "r", 7, pages=THEIRS, aux=THEIR_ROW)
    assert end(source) == "decode gave it up"
    assert_all_is_well(prefill, decode)


def test_an_abort_on_decode_before_prefills_server_is_known_leaves_nothing(
    servers: Servers,
) -> None:
    prefill, decode = servers.make("prefill"), servers.make("decode")
    [reader] = decode.ranks
    prefill.bootstrap.kill()  # type: ignore[union-attr]  # a prefill server has one
    reader.ask("want", "r", 7, prefill.address)
    assert reader.ask("statuses", "r") == ["Bootstrapping"]
    reader.ask("abort", "r")
    assert end(reader) == ABORTED
    decode.assert_nothing_is_left()


def test_an_abort_after_success_changes_nothing(servers: Servers) -> None:
    prefill, decode = servers.make("prefill"), servers.make("decode")
    begin(prefill.ranks, decode.ranks, prefill.address)
    finish(prefill.ranks, decode.ranks)
    for rank in (*prefill.ranks, *decode.ranks):
        rank.ask("abort", "r")
        rank.ask("clear", "r")
    assert decode.each("digests", OWN, []) == prefill.each("digests", THEIRS, [])
    assert_all_is_well(prefill, decode)


@pytest.mark.parametrize("stubborn", [True, False])
def test_pages_are_not_free_while_a_rank_reads_though_the_other_one_has_failed(
    servers: Servers, *, stubborn: bool
) -> None:
    """SGLang fails a request on all ranks when one fails, and frees its pages on all of them."""
    prefill, decode = servers.make("prefill", tp=2), servers.make("decode", tp=2)
    reading, failing = decode.ranks
    reading.ask("hold_reads", 3, stubborn=stubborn)
    failing.ask("hold_reads", 3)
    begin(prefill.ranks, decode.ranks, prefill.address)
    for rank in decode.ranks:
        rank.await_read()
    prefill.ranks[1].kill()
    failing.await_status("r", "Failed")
    assert failing.ask("fail", "r")["elsewhere"] is False
    # What `pop_transferred` does on the rank that has not failed itself.
    ended = reading.ask("fail", "r")
    assert ended["elsewhere"] is True
    for rank in decode.ranks:
        rank.ask("notify_abort", "r")
    if stubborn:  # like a NIC that cannot be told to stop
        assert reading.ask("safe", 7) is False
        reading.ask("release_reads")
    until(lambda: all(decode.each("safe", 7)), "both to be safe", 5)
    reading.ask("fill", KEPT)
    kept = reading.ask("digests", OWN, [])
    reading.ask("clear", "r")
    prefill.ranks[0].await_status("r", "Failed")
    prefill.ranks[0].ask("fail", "r")
    reading.ask("release_reads")
    # Whatever was still on its way into those pages lands before this request's bytes.
    begin(prefill.ranks[:1], [reading], prefill.address, "next", 8, own=(40, 41, 42, 43))
    finish(prefill.ranks[:1], [reading], "next")
    assert reading.ask("digests", OWN, []) == kept
    decode.assert_nothing_is_left()
