"""Pipeline stages, and data-parallel groups of attention ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_flow import OWN, OWN_ROW, THEIR_ROW, THEIRS, begin, finish

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sglang_ranks import RankProcess, Servers


def together(ranks: Sequence[RankProcess], pages: Sequence[int]) -> dict[str, str]:
    """The layers of all stages."""
    found: dict[str, str] = {}
    for rank in ranks:
        layers = rank.ask("digests", pages, [])
        assert not found.keys() & layers.keys()
        found |= layers
    return found


def test_one_rank_reads_the_layers_of_every_stage_and_the_metadata_of_the_last(
    servers: Servers,
) -> None:
    prefill, decode = servers.make("prefill", pp=2, layers=4), servers.make("decode", layers=4)
    begin(prefill.ranks, decode.ranks, prefill.address)
    finish(prefill.ranks, decode.ranks)
    assert len(together(prefill.ranks, THEIRS)) == 8  # K and V of four layers
    assert together(decode.ranks, OWN) == together(prefill.ranks, THEIRS)
    first, last = prefill.each("metadata", THEIR_ROW)
    assert first != last
    assert decode.each("metadata", OWN_ROW) == [last]
    for server in (decode, prefill):
        server.assert_nothing_is_left()


def test_with_as_many_stages_each_reads_its_own_layers(servers: Servers) -> None:
    prefill = servers.make("prefill", pp=2, layers=4)
    decode = servers.make("decode", pp=2, layers=4)
    begin(prefill.ranks, decode.ranks, prefill.address)
    finish(prefill.ranks, decode.ranks)
    assert decode.each("digests", OWN, []) == prefill.each("digests", THEIRS, [])
    assert decode.each("metadata", OWN_ROW) == prefill.each("metadata", THEIR_ROW)
    for server in (decode, prefill):
        server.assert_nothing_is_left()


def test_the_room_says_which_group_of_prefill_has_the_request(servers: Servers) -> None:
    prefill, decode = servers.make("prefill", dp=2), servers.make("decode")
    for room in (8, 9):
        begin([prefill.ranks[room % 2]], decode.ranks, prefill.address, str(room), room)
        finish([prefill.ranks[room % 2]], decode.ranks, str(room))
        held = prefill.ranks[room % 2].ask("digests", THEIRS, [])
        assert decode.each("digests", OWN, []) == [held]
    for server in (decode, prefill):
        server.assert_nothing_is_left()


def test_a_group_chosen_otherwise_is_asked_for(servers: Servers) -> None:
    """Prefill's group 1 takes an even room, and says so to its bootstrap server."""
    prefill = servers.make("prefill", dp=2, balance="round_robin")
    decode = servers.make("decode")
    begin(prefill.ranks[1:], decode.ranks, prefill.address, room=8)
    finish(prefill.ranks[1:], decode.ranks)
    assert decode.each("digests", OWN, []) == prefill.each("digests", THEIRS, [])[1:]


def test_a_group_that_the_room_does_not_name_is_refused(servers: Servers) -> None:
    """SGLang fails such a request when its sender is made; ours is none, then."""
    prefill = servers.make("prefill", dp=2)
    rank = prefill.ranks[1]
    rank.ask("offer", "r", 8, pages=THEIRS, aux=THEIR_ROW)
    rank.await_status("r", "Failed")
    assert "implies dp_rank 0" in rank.ask("fail", "r")["reason"]
    prefill.assert_nothing_is_left()
