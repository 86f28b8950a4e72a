"""What SGLang's scheduler is told, and when: a status too early gives pages away or ends it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from node_stage import until
from sglang_flow import KEPT, ORDER, OWN, OWN_ROW, THEIR_ROW, THEIRS, begin, finish

if TYPE_CHECKING:
    from sglang_ranks import Servers

LAYER_BUFFERS = 4  # K and V of two layers
UNWRITTEN = ["", ""]  # both rows of metadata, which are one move


def test_prefill_bootstraps_until_every_reader_subscribed_and_transfers_until_all_released(
    servers: Servers,
) -> None:
    prefill, decode = servers.make("prefill", mla=True), servers.make("decode", tp=2, mla=True)
    [source], [first, second] = prefill.ranks, decode.ranks
    source.ask("offer", "r", 7, pages=THEIRS, aux=THEIR_ROW, chunks=[])
    for rank in decode.ranks:
        rank.ask("want", "r", 7, prefill.address)
        assert rank.await_status("r", "WaitingForInput") == ORDER[:2]
    until(lambda: source.ask("hold_of", 7)["claims"] == 2, "both claims")
    assert source.ask("statuses", "r") == ORDER[:1]
    first.ask("allocate", "r", pages=OWN, aux=OWN_ROW)
    until(lambda: source.ask("hold_of", 7)["readers"] == 1, "the first reader")
    assert source.ask("statuses", "r") == ORDER[:1]
    second.ask("hold_reads")
    second.ask("allocate", "r", pages=OWN, aux=OWN_ROW)
    source.await_status("r", "WaitingForInput")
    source.ask("send", "r", 2)
    second.await_read()
    assert source.ask("statuses", "r") == ORDER[:2]
    source.ask("send", "r", 2)
    first.await_status("r", "Success")
    assert source.ask("statuses", "r") == ORDER[:3]
    assert second.ask("statuses", "r") == ORDER[:2]
    second.ask("release_reads")
    assert finish(prefill.ranks, decode.ranks) == [ORDER]
    assert decode.each("digests", OWN, []) == prefill.each("digests", THEIRS, []) * 2


def test_a_chunk_is_read_while_the_next_one_is_computed(servers: Servers) -> None:
    prefill, decode = servers.make("prefill"), servers.make("decode")
    [source], [reader] = prefill.ranks, decode.ranks
    begin(prefill.ranks, decode.ranks, prefill.address, chunks=[3])
    early = source.ask("digests", THEIRS[:3], [])
    until(lambda: reader.ask("digests", OWN[:3], []) == early, "the bytes of the first chunk")
    assert reader.ask("statuses", "r") == ORDER[:2]
    assert source.ask("statuses", "r") == ORDER[:2]
    assert reader.ask("metadata", OWN_ROW) == UNWRITTEN
    source.ask("send", "r", 1)
    finish(prefill.ranks, decode.ranks)
    assert decode.each("digests", OWN, []) == prefill.each("digests", THEIRS, [])
    assert reader.ask("moves") == len(OWN) * LAYER_BUFFERS + 1


def test_metadata_is_read_behind_the_last_page(servers: Servers) -> None:
    """SGLang takes a written row as the sign that all is here."""
    prefill, decode = servers.make("prefill"), servers.make("decode")
    [reader] = decode.ranks
    reader.ask("hold_reads", len(OWN) * LAYER_BUFFERS)
    begin(prefill.ranks, decode.ranks, prefill.address)
    reader.await_read()
    assert decode.each("digests", OWN, []) == prefill.each("digests", THEIRS, [])
    assert reader.ask("metadata", OWN_ROW) == UNWRITTEN
    assert reader.ask("statuses", "r") == ORDER[:2]
    reader.ask("release_reads")
    finish(prefill.ranks, decode.ranks)
    assert decode.each("metadata", OWN_ROW) == prefill.each("metadata", THEIR_ROW)


def test_a_prefix_that_decode_has_is_not_moved_again(servers: Servers) -> None:
    prefill, decode = servers.make("prefill"), servers.make("decode")
    [reader] = decode.ranks
    reader.ask("fill", KEPT)
    kept = reader.ask("digests", OWN[:2], [])
    prefill.each("offer", "r", 7, pages=THEIRS, aux=THEIR_ROW)
    reader.ask("want", "r", 7, prefill.address)
    reader.ask("allocate", "r", pages=OWN[2:], aux=OWN_ROW, prefix=2 * 4)
    finish(prefill.ranks, decode.ranks)
    assert reader.ask("digests", OWN[:2], []) == kept
    assert decode.each("digests", OWN[2:], []) == prefill.each("digests", THEIRS[2:], [])
    assert reader.ask("moves") == 2 * LAYER_BUFFERS + 1


def test_metadata_arrives_before_success_also_when_no_page_moves(servers: Servers) -> None:
    """Decode has the whole prompt: what it lacks is the first token."""
    prefill, decode = servers.make("prefill"), servers.make("decode")
    [reader] = decode.ranks
    reader.ask("hold_reads")
    prefill.each("offer", "r", 7, pages=THEIRS, aux=THEIR_ROW)
    reader.ask("want", "r", 7, prefill.address)
    reader.ask("allocate", "r", pages=[], aux=OWN_ROW, prefix=4 * 4)
    reader.await_read()
    assert reader.ask("statuses", "r") == ORDER[:2]
    assert reader.ask("metadata", OWN_ROW) == UNWRITTEN
    reader.ask("release_reads")
    finish(prefill.ranks, decode.ranks)
    assert decode.each("metadata", OWN_ROW) == prefill.each("metadata", THEIR_ROW)
    assert reader.ask("moves") == 1
    for server in (decode, prefill):
        server.assert_nothing_is_left()


def test_pages_behind_a_device_event_are_not_named_before_it_fired(servers: Servers) -> None:
    """Nor are later ones, whose own forward pass may be done: pages are named in order."""
    prefill, decode = servers.make("prefill"), servers.make("decode")
    [source], [reader] = prefill.ranks, decode.ranks
    begin(prefill.ranks, decode.ranks, prefill.address, chunks=[])
    source.await_status("r", "WaitingForInput")
    source.ask("send", "r", 2, behind_event=True)
    source.ask("send", "r", 2)
    until(lambda: source.ask("waited_for", "r"), "the event to be waited for")
    assert source.ask("hold_of", 7)["pages"] == 0
    assert source.ask("statuses", "r") == ORDER[:2]
    assert reader.ask("moves") == 0
    source.ask("fire", "r")
    assert finish(prefill.ranks, decode.ranks) == [ORDER]
    assert decode.each("digests", OWN, []) == prefill.each("digests", THEIRS, [])


def test_a_forward_pass_that_failed_on_the_device_fails_the_request(servers: Servers) -> None:
    prefill, decode = servers.make("prefill"), servers.make("decode")
    [source], [reader] = prefill.ranks, decode.ranks
    begin(prefill.ranks, decode.ranks, prefill.address, chunks=[])
    source.await_status("r", "WaitingForInput")
    source.ask("send", "r", 4, behind_event=True)
    source.ask("fire", "r", error="an illegal memory access")
    for rank in (source, reader):
        rank.await_status("r", "Failed")
        assert "on the device: an illegal memory access" in rank.ask("fail", "r")["reason"]
    assert reader.ask("moves") == 0
    for server in (decode, prefill):
        server.assert_nothing_is_left()


def test_an_event_that_fires_after_an_abort_names_nothing(servers: Servers) -> None:
    """The room is another request's by then, and the pages too."""
    prefill, decode = servers.make("prefill"), servers.make("decode")
    [source], [reader] = prefill.ranks, decode.ranks
    begin(prefill.ranks, decode.ranks, prefill.address, chunks=[])
    source.await_status("r", "WaitingForInput")
    source.ask("send", "r", 4, behind_event=True)
    until(lambda: source.ask("waited_for", "r"), "the event to be waited for")
    source.ask("abort", "r")
    reader.await_status("r", "Failed")
    assert "Aborted by AbortReq." in reader.ask("fail", "r")["reason"]
    begin(prefill.ranks, decode.ranks, prefill.address, "next", theirs=(30, 31), own=(8, 9))
    source.ask("fire", "r")
    finish(prefill.ranks, decode.ranks, "next")
    assert decode.each("digests", [8, 9], []) == prefill.each("digests", [30, 31], [])
    for server in (decode, prefill):
        server.assert_nothing_is_left()
