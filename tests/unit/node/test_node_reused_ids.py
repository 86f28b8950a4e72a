"""A transfer id that is used again: each use hears of its own pages and verdicts, and no other's.

SGLang names a request by its bootstrap_room and may give the number to another request later.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import pytest
import raw_peer
from node_stage import Rank, run, until
from raw_peer import release, subscribe

from mooncake_connector import wire
from mooncake_connector.session import HoldState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mooncake_connector.holds import Hold


@pytest.fixture
def decode(prefill: Rank) -> Iterator[raw_peer.RawPeer]:
    """A decode node that says what the test says."""
    with raw_peer.join(prefill) as peer:
        yield peer


def opened(prefill: Rank, *, reusable: bool = True) -> Hold:
    """The id's next use, that nobody asks `take_sent` for."""
    hold = prefill.node.prefill.open("t", "", "key", reusable=reusable)
    assert hold is not None
    return hold


def offer(prefill: Rank, *pages: int, reusable: bool = True) -> Hold:
    hold = opened(prefill, reusable=reusable)
    prefill.node.prefill.pages_ready("t", [run(0, *pages)], last=True, of=hold)
    prefill.node.prefill.hold("t", "", of=hold)
    return hold


def read(decode: raw_peer.RawPeer, reader: str) -> wire.Ready:
    decode.send(subscribe(reader=reader))
    return decode.receive(wire.Ready)


def verdict(decode: raw_peer.RawPeer, attempt: int, reader: str, **fields: object) -> bool:
    decode.send(release(attempt, reader=reader, **fields))
    said = decode.receive(wire.Released)
    assert (said.attempt, said.reader) == (attempt, reader)
    return said.held


def parked(prefill: Rank, count: int = 1) -> None:
    """Wait until so many messages wait for the id's next use."""
    waiting = prefill.node.prefill._parking._parked
    until(lambda: len(waiting.get("t", ())) == count, f"{count} to be parked")


def test_late_answers_to_an_earlier_use_of_an_id_do_not_touch_the_next_one(
    make_pair: tuple[Rank, raw_peer.RawPrefill],
) -> None:
    decode, raw = make_pair
    decode.fetch(raw.ref, run(0, 1), request="early")
    with raw.join() as peer:
        early = peer.receive(wire.Subscribe).reader
        decode.node.cancel("early")
        peer.receive(wire.Release)
        decode.fetch(raw.ref, run(0, 2), request="late")
        late = peer.receive(wire.Subscribe).reader
        says = functools.partial(ready, 7)
        peer.send(
            says(reader=early),
            wire.Gone(transfer_id="t", attempt=1, reader=early, reason="over", retry=False),
            wire.Gone(transfer_id="t", attempt=1, reader=early, reason="over", retry=True),
            ready(8, reader=late),
        )
        assert peer.receive(wire.Release).reader == late
        peer.send(
            wire.Released(transfer_id="t", attempt=1, reader=early, held=False),
            wire.Released(transfer_id="t", attempt=1, reader=late, held=True),
        )
        assert decode.await_end("late")
    assert decode.failures == {}
    assert len(decode.batches) == 1
    assert (decode.pages(run(0, 2)) == raw.like.pages(run(0, 8))).all()
    assert not decode.pages(run(0, 1)).any()


def ready(page: int, reader: str) -> wire.Ready:
    pages = (wire.pack_pages(run(0, page)),)
    return wire.Ready(transfer_id="t", attempt=1, reader=reader, grant=b"", pages=pages, last=True)


@pytest.fixture
def make_pair(
    prefill: Rank, make: Callable[..., Rank]
) -> Iterator[tuple[Rank, raw_peer.RawPrefill]]:
    """A decode rank, and a prefill node that says what the test says."""
    with raw_peer.RawPrefill(prefill) as server:
        yield make("decode"), server


def test_a_subscription_to_the_next_use_waits_for_it_and_is_served_its_pages(
    prefill: Rank, decode: raw_peer.RawPeer
) -> None:
    first = offer(prefill, 5)
    grant = read(decode, "one").grant
    assert verdict(decode, 1, "one")
    assert first.delivered
    decode.send(wire.Claim(transfer_id="t"), subscribe(reader="two"))
    parked(prefill, 2)
    offer(prefill, 6)
    said = decode.receive(wire.Ready)
    assert (said.reader, said.attempt) == ("two", 2)
    assert wire.unpack_pages(said.pages[0]).ids.tolist() == [6]
    assert said.grant != grant
    assert verdict(decode, 1, "one")  # what was said stays said
    assert verdict(decode, 2, "two")
    assert not prefill.claims()


def test_a_reader_of_the_next_use_who_gives_up_early_is_not_answered_for_the_last_one(
    prefill: Rank, decode: raw_peer.RawPeer
) -> None:
    offer(prefill, 5)
    read(decode, "one")
    assert verdict(decode, 1, "one")
    decode.send(release(0, reader="two", ok=False))
    parked(prefill)
    hold = offer(prefill, 6)
    assert not hold.delivered
    assert decode.receive(wire.Released).reader == "two"
    assert hold.reason == "decode gave it up"
    assert prefill.node.prefill.held_pages() == 0


def test_one_who_comes_too_late_for_a_use_that_nobody_read_is_told_at_once(
    prefill: Rank, decode: raw_peer.RawPeer
) -> None:
    prefill.node.prefill.end("t", "prefill aborted it", retry=False, of=opened(prefill))
    decode.send(subscribe())
    said = decode.receive(wire.Gone)
    assert (said.attempt, said.reader, said.reason) == (1, "raw", "prefill aborted it")
    assert not verdict(decode, 0, "raw", ok=False)
    assert not prefill.node.prefill._parking._parked
    opened(prefill)
    assert prefill.readers() == 0  # nothing of it meets the next use


def test_a_reader_of_the_ended_use_who_asks_again_is_told_at_once(
    prefill: Rank, decode: raw_peer.RawPeer
) -> None:
    offer(prefill, 5)
    read(decode, "one")
    assert verdict(decode, 1, "one")
    decode.send(subscribe(reader="one"))
    assert decode.receive(wire.Gone).reason == "all its readers released it"


def test_an_ended_id_that_is_not_used_again_is_gone_at_once_for_everybody(
    prefill: Rank, decode: raw_peer.RawPeer
) -> None:
    offer(prefill, 5, reusable=False)
    read(decode, "one")
    assert verdict(decode, 1, "one")
    decode.send(wire.Claim(transfer_id="t"), subscribe(reader="two"))
    assert (decode.receive(wire.Gone).reader, prefill.node.prefill._parking._parked) == ("two", {})
    assert not verdict(decode, 0, "two", ok=False)


def test_an_id_that_is_in_use_is_not_opened_again(prefill: Rank, decode: raw_peer.RawPeer) -> None:
    offer(prefill, 5)
    assert prefill.node.prefill.open("t", "", "another key", reusable=True) is None
    assert read(decode, "one").attempt == 1
    assert verdict(decode, 1, "one")


def test_what_is_meant_for_an_earlier_use_leaves_the_next_one_alone(
    prefill: Rank, decode: raw_peer.RawPeer
) -> None:
    side = prefill.node.prefill
    first = opened(prefill)
    side.end("t", "aborted", retry=False, of=first)
    second = opened(prefill)
    side.pages_ready("t", [run(0, 5)], last=True, of=first)
    side.hold("t", "", of=first)
    side.end("t", "aborted", retry=False, of=first)
    assert (second.state, second.pages) == (HoldState.COMPUTING, [])
    side.pages_ready("t", [run(0, 6)], last=True, of=second)
    side.hold("t", "", of=second)
    said = read(decode, "two")
    assert (said.attempt, wire.unpack_pages(said.pages[0]).ids.tolist()) == (2, [6])
    assert verdict(decode, 2, "two")


@pytest.mark.parametrize("end", ["released", "given up", "ended", "ended while computing", "late"])
def test_a_request_without_a_name_is_never_reported(
    prefill: Rank, decode: raw_peer.RawPeer, end: str
) -> None:
    hold = opened(prefill) if end == "ended while computing" else offer(prefill, 5)
    match end:
        case "released":
            read(decode, "one")
            assert verdict(decode, 1, "one")
        case "given up":
            decode.send(release(0, reader="one", ok=False))
            decode.receive(wire.Released)
        case _:
            prefill.node.prefill.end("t", "reused", retry=False, of=hold)
    if end == "late":
        prefill.node.prefill.hold("t", "", of=hold)
    assert hold.state.name == "ENDED"
    assert prefill.node.prefill.take_sent() == set()
