"""Rooms are numbers that a router draws: they come again, and at bad moments."""

from __future__ import annotations

from typing import TYPE_CHECKING

from node_stage import until
from sglang_flow import OWN, OWN_ROW, THEIR_ROW, THEIRS, begin, finish

if TYPE_CHECKING:
    from sglang_ranks import RankProcess, Server, Servers

OTHERS, OWN_OTHERS = (30, 31, 9, 2), (10, 20, 30, 40)


def assert_new_bytes(prefill: Server, decode: Server) -> None:
    """The second request's, where the second request wanted them."""
    assert decode.each("digests", OWN_OTHERS, []) == prefill.each("digests", OTHERS, [])
    for server in (decode, prefill):
        server.assert_nothing_is_left()


def give_up(rank: RankProcess, name: str) -> str:
    """What a scheduler does with a request that the client no longer wants; the reason."""
    rank.ask("abort", name)
    rank.await_status(name, "Failed")
    return str(rank.ask("fail", name)["reason"])


def test_a_room_is_used_again_after_success(servers: Servers) -> None:
    prefill, decode = servers.make("prefill"), servers.make("decode")
    begin(prefill.ranks, decode.ranks, prefill.address, "old")
    finish(prefill.ranks, decode.ranks, "old")
    begin(prefill.ranks, decode.ranks, prefill.address, "new", theirs=OTHERS, own=OWN_OTHERS)
    finish(prefill.ranks, decode.ranks, "new")
    assert_new_bytes(prefill, decode)


def test_decode_may_come_first_to_a_room_that_is_used_again(servers: Servers) -> None:
    prefill, decode = servers.make("prefill"), servers.make("decode")
    [source], [reader] = prefill.ranks, decode.ranks
    begin(prefill.ranks, decode.ranks, prefill.address, "old")
    finish(prefill.ranks, decode.ranks, "old")
    reader.ask("want", "new", 7, prefill.address)
    reader.ask("allocate", "new", pages=OWN_OTHERS, aux=OWN_ROW)
    reader.await_status("new", "WaitingForInput")
    source.ask("offer", "new", 7, pages=OTHERS, aux=THEIR_ROW)
    finish(prefill.ranks, decode.ranks, "new")
    assert_new_bytes(prefill, decode)


def test_a_room_is_used_again_after_a_failure(servers: Servers) -> None:
    prefill, decode = servers.make("prefill"), servers.make("decode")
    [source], [reader] = prefill.ranks, decode.ranks
    begin(prefill.ranks, decode.ranks, prefill.address, "old", chunks=[2])
    source.await_status("old", "WaitingForInput")
    assert give_up(reader, "old") == "Aborted by AbortReq."
    source.await_status("old", "Failed")
    assert "decode gave it up" in source.ask("fail", "old")["reason"]
    begin(prefill.ranks, decode.ranks, prefill.address, "new", theirs=OTHERS, own=OWN_OTHERS)
    finish(prefill.ranks, decode.ranks, "new")
    assert_new_bytes(prefill, decode)


def test_a_room_is_used_again_while_the_old_read_still_drains(servers: Servers) -> None:
    prefill, decode = servers.make("prefill"), servers.make("decode")
    [source], [reader] = prefill.ranks, decode.ranks
    reader.ask("hold_reads", stubborn=True)
    begin(prefill.ranks, decode.ranks, prefill.address, "old")
    reader.await_read()
    give_up(reader, "old")
    assert reader.ask("safe", 7) is False
    give_up(source, "old")
    begin(prefill.ranks, decode.ranks, prefill.address, "new", theirs=OTHERS, own=OWN_OTHERS)
    until(lambda: source.ask("hold_of", 7)["readers"] == 1, "the new reader")
    assert reader.ask("safe", 7) is False
    assert reader.ask("statuses", "new")[-1] == "WaitingForInput"
    reader.ask("release_reads")
    finish(prefill.ranks, decode.ranks, "new")
    until(lambda: reader.ask("safe", 7), "the old read to end")
    assert_new_bytes(prefill, decode)


def test_of_two_requests_with_one_room_only_the_second_fails(servers: Servers) -> None:
    prefill, decode = servers.make("prefill"), servers.make("decode")
    [source], [reader] = prefill.ranks, decode.ranks
    reader.ask("hold_reads")
    begin(prefill.ranks, decode.ranks, prefill.address, "first")
    reader.await_read()
    begin(prefill.ranks, decode.ranks, prefill.address, "second", theirs=OTHERS, own=OWN_OTHERS)
    for rank in (source, reader):
        rank.await_status("second", "Failed")
        ended = rank.ask("fail", "second")
        assert ended == {
            "reason": "bootstrap_room 7 is another request's, still running",
            "elsewhere": False,
        }
        rank.ask("clear", "second")
    reader.ask("release_reads")
    finish(prefill.ranks, decode.ranks, "first")
    assert decode.each("digests", OWN, []) == prefill.each("digests", THEIRS, [])
    for server in (decode, prefill):
        server.assert_nothing_is_left()


def test_prompts_that_differ_are_refused(servers: Servers) -> None:
    """A router that pairs two requests wrongly must not serve one with the other's KV."""
    prefill, decode = servers.make("prefill"), servers.make("decode")
    [source], [reader] = prefill.ranks, decode.ranks
    begin(prefill.ranks, decode.ranks, prefill.address, key="another prompt")
    reader.await_status("r", "Failed")
    reason = reader.ask("fail", "r")["reason"]
    assert "another prompt" in reason
    assert "decode's is key" in reason
    assert source.ask("statuses", "r")[-1] == "Bootstrapping"
    give_up(source, "r")
    for server in (decode, prefill):
        server.assert_nothing_is_left()
