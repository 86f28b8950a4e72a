"""Processes that die, stop or start over, and memory that SGLang takes away for a while."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from node_stage import until
from sglang_flow import KEPT, OWN, OWN_ROW, THEIR_ROW, THEIRS, begin, finish, transfer

if TYPE_CHECKING:
    from sglang_ranks import RankProcess, Server, Servers

#: A silent peer is dead after 10 s (`peer_dead_after_s`); looking for it takes a quarter second,
#: being heard by this process on a busy machine longer.
SILENT_S = 12.0
#: The kernel resets the connections of a process that died.
RESET_S = 5.0


def end_within(limit: float, rank: RankProcess, name: str, since: float) -> str:
    """The request fails in time; the reason."""
    rank.await_status(name, "Failed", since + limit - time.monotonic())
    return str(rank.ask("fail", name)["reason"])


def read_and_claim(prefill: Server, decode: Server) -> None:
    """Request "r" is being read, "c" is claimed and has no pages yet."""
    [source], [reader] = prefill.ranks, decode.ranks
    reader.ask("hold_reads")
    begin(prefill.ranks, decode.ranks, prefill.address)
    reader.await_read()
    source.await_status("r", "Transferring")
    source.ask("offer", "c", 8, pages=THEIRS, aux=THEIR_ROW)
    reader.ask("want", "c", 8, prefill.address)
    reader.await_status("c", "WaitingForInput")
    until(lambda: source.ask("hold_of", 8)["claims"] == 1, "the claim")


@pytest.mark.parametrize(("how", "limit"), [("kill", RESET_S), ("stop", SILENT_S)])
def test_requests_fail_with_prefills_address_when_it_dies_or_stops(
    servers: Servers, how: str, limit: float
) -> None:
    prefill, decode = servers.make("prefill"), servers.make("decode")
    [source], [reader] = prefill.ranks, decode.ranks
    node = source.ask("address_of_node")
    read_and_claim(prefill, decode)
    getattr(source, how)()
    since = time.monotonic()
    for name in ("r", "c"):
        reason = end_within(limit, reader, name, since)
        assert node in reason
        assert "prefill" in reason
    until(lambda: reader.ask("safe", 7), "its read to end", 5)
    reader.ask("release_reads")
    decode.assert_nothing_is_left()
    prefill.kill()
    again = servers.make("prefill", port=prefill.port, seed=5)
    transfer(again, decode, "next", 9)


@pytest.mark.parametrize(("how", "limit"), [("kill", RESET_S), ("stop", SILENT_S)])
def test_prefills_pages_are_free_when_decode_dies_or_stops(
    servers: Servers, how: str, limit: float
) -> None:
    prefill, decode = servers.make("prefill"), servers.make("decode")
    [source], [reader] = prefill.ranks, decode.ranks
    read_and_claim(prefill, decode)
    getattr(reader, how)()
    since = time.monotonic()
    for name, room in (("r", 7), ("c", 8)):
        reason = end_within(limit, source, name, since)
        assert "decode node" in reason
        assert "is gone" in reason
        assert source.ask("hold_of", room)["readers"] == 0
    prefill.assert_nothing_is_left()
    transfer(prefill, servers.make("decode"), "next", 9)


def test_a_prefill_that_starts_over_on_its_port_serves_at_once(servers: Servers) -> None:
    """No request ran when it died: what decode remembers of it must not outlive it."""
    prefill, decode = servers.make("prefill"), servers.make("decode")
    transfer(prefill, decode)
    prefill.kill()
    again = servers.make("prefill", port=prefill.port, seed=5)
    transfer(again, decode, "next", 7)
    decode.assert_nothing_is_left()


def test_a_prefill_that_starts_over_with_more_ranks_is_looked_at_anew(servers: Servers) -> None:
    """Else its new ranks would wait for a reader that nobody sends to them."""
    prefill, decode = servers.make("prefill", mla=True), servers.make("decode", mla=True)
    transfer(prefill, decode)
    prefill.kill()
    again = servers.make("prefill", port=prefill.port, tp=2, mla=True, seed=5)
    begin(again.ranks, decode.ranks, again.address, "next", 8)
    finish(again.ranks, decode.ranks, "next")
    assert decode.each("digests", OWN, []) == again.each("digests", THEIRS, [])[:1]


def test_a_stopped_decode_that_goes_on_is_served_again(servers: Servers) -> None:
    """Prefill has given up on it; its own request fails, and it connects anew."""
    settings: dict[str, object] = {"heartbeat_interval_s": 0.2, "peer_dead_after_s": 1.0}
    prefill = servers.make("prefill", settings=settings)
    decode = servers.make("decode", settings=settings)
    [source], [reader] = prefill.ranks, decode.ranks
    begin(prefill.ranks, decode.ranks, prefill.address, chunks=[2])
    source.await_status("r", "WaitingForInput")
    reader.stop()
    source.await_status("r", "Failed")
    source.ask("fail", "r")
    reader.go_on()
    reader.await_status("r", "Failed")
    reader.ask("fail", "r")
    transfer(prefill, decode, "next", 8)
    for server in (decode, prefill):
        server.assert_nothing_is_left()


def test_decodes_memory_is_not_written_once_it_was_taken_away(servers: Servers) -> None:
    prefill, decode = servers.make("prefill"), servers.make("decode")
    [source], [reader] = prefill.ranks, decode.ranks
    reader.ask("hold_reads", 3)
    begin(prefill.ranks, decode.ranks, prefill.address)
    reader.await_read()
    reader.ask("deregister")
    assert reader.ask("held") == 0
    reader.ask("fill", KEPT)
    kept = reader.ask("digests", OWN, [])
    reader.ask("release_reads")
    reader.await_status("r", "Failed")
    assert "released its KV cache's memory" in reader.ask("fail", "r")["reason"]
    source.await_status("r", "Failed")
    source.ask("fail", "r")
    assert reader.ask("digests", OWN, []) == kept
    assert reader.ask("metadata", OWN_ROW) == ["", ""]
    reader.ask("register")
    transfer(prefill, decode, "next", 8)
    for server in (decode, prefill):
        server.assert_nothing_is_left()


def test_pages_that_were_read_are_not_served_once_their_memory_was_taken_away(
    servers: Servers,
) -> None:
    """The scheduler has not looked since they came, and looks again when the memory is back."""
    prefill, decode = servers.make("prefill"), servers.make("decode")
    [reader] = decode.ranks
    begin(prefill.ranks, decode.ranks, prefill.address, chunks=[2])
    prefill.await_status("r", "WaitingForInput")
    reader.ask("pause", paused=True)
    prefill.each("send", "r", 2)
    until(lambda: reader.ask("unseen_ends") == 1, "the read to end")
    reader.ask("deregister")
    reader.ask("register")
    reader.ask("pause", paused=False)
    reader.await_status("r", "Failed")
    assert "released its KV cache's memory" in reader.ask("fail", "r")["reason"]
    prefill.await_status("r", "Success")  # it was read, after all
    prefill.each("clear", "r")
    for server in (decode, prefill):
        server.assert_nothing_is_left()


def test_prefills_memory_is_not_read_once_it_was_taken_away(servers: Servers) -> None:
    prefill, decode = servers.make("prefill"), servers.make("decode")
    [source], [reader] = prefill.ranks, decode.ranks
    reader.ask("hold_reads", 3)
    begin(prefill.ranks, decode.ranks, prefill.address)
    reader.await_read()
    source.ask("deregister")
    for rank in (source, reader):
        rank.await_status("r", "Failed")
        assert "released its KV cache's memory" in rank.ask("fail", "r")["reason"]
    reader.ask("release_reads")
    source.ask("register")
    transfer(prefill, decode, "next", 8)
    for server in (decode, prefill):
        server.assert_nothing_is_left()


def test_a_prefill_that_never_registered_is_named_with_its_port(servers: Servers) -> None:
    decode = servers.make("decode")
    [reader] = decode.ranks
    prefill = servers.make("prefill")
    prefill.kill()
    reader.ask("want", "r", 7, prefill.address)
    reader.await_status("r", "Failed")
    reason = reader.ask("fail", "r")["reason"]
    assert prefill.address in reason
    assert "--disaggregation-bootstrap-port" in reason
    again = servers.make("prefill", port=prefill.port)
    transfer(again, decode, "next", 8)
