"""Several ranks that read one transfer, as whoever opened it sees them come and go."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pytest
import raw_peer
from node_stage import Clock, Rank, run, until
from raw_peer import release, subscribe

from mooncake_connector import wire

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mooncake_connector.holds import Hold


class Seen(NamedTuple):
    """A hold at one moment."""

    state: str
    came: int
    subscribed: bool
    delivered: bool


class Watched:
    """A transfer for which prefill notes every change."""

    def __init__(self, prefill: Rank, **how: bool) -> None:
        self.seen: list[Seen] = []
        self.side = prefill.node.prefill
        hold = self.side.open("t", "p-t", "key", on_change=self._note, **how)
        assert hold is not None
        self.hold = hold

    def _note(self, hold: Hold) -> None:
        self.seen.append(Seen(hold.state.name, len(hold.readers), hold.subscribed, hold.delivered))

    def take(self) -> list[Seen]:
        """What changed since the last look, each change once."""
        seen, self.seen = self.seen, []
        return [one for number, one in enumerate(seen) if number == 0 or one != seen[number - 1]]

    def finish(self, *pages: int, first: int = 0) -> None:
        """The prompt is computed and its pages wait."""
        self.side.pages_ready("t", [run(first, *pages)], last=True, of=self.hold)
        self.side.hold("t", "p-t", of=self.hold)


@pytest.fixture
def two(prefill: Rank) -> Iterator[tuple[raw_peer.RawPeer, raw_peer.RawPeer]]:
    """Two decode nodes that say what the test says."""
    with raw_peer.join(prefill) as one, raw_peer.join(prefill) as other:
        yield one, other


def come(peer: raw_peer.RawPeer, reader: str, first: int = 0) -> None:
    """Subscribe as one of two."""
    peer.send(subscribe(reader=reader, readers=2, first=(first,)))


def verdict(peer: raw_peer.RawPeer, reader: str, attempt: int = 1, *, ok: bool = True) -> bool:
    peer.send(release(attempt, reader=reader, ok=ok))
    said = peer.receive(wire.Released)
    assert said.reader == reader
    return said.held


def test_a_hold_tells_who_came_what_they_want_and_what_they_got(
    prefill: Rank, two: tuple[raw_peer.RawPeer, raw_peer.RawPeer]
) -> None:
    one, other = two
    watched = Watched(prefill)
    hold = watched.hold
    assert not hold.subscribed
    assert not hold.delivered
    come(one, "one", 2)
    until(lambda: hold.readers, "the first")
    assert (hold.subscribed, hold.first) == (False, (2,))
    come(other, "other", 1)
    until(lambda: hold.subscribed, "the second")
    assert hold.first == (1,)
    watched.finish(5, 6, 7)
    one.receive(wire.Ready)
    other.receive(wire.Ready)
    assert verdict(one, "one")
    assert not hold.delivered
    assert verdict(other, "other")
    assert hold.delivered
    prefill.await_sent()
    assert watched.take() == [
        Seen("COMPUTING", 1, subscribed=False, delivered=False),
        Seen("COMPUTING", 2, subscribed=True, delivered=False),
        Seen("HELD", 2, subscribed=True, delivered=False),
        Seen("ENDED", 2, subscribed=True, delivered=True),
    ]


def test_one_reader_is_enough_where_one_is_expected(
    prefill: Rank, two: tuple[raw_peer.RawPeer, raw_peer.RawPeer]
) -> None:
    watched = Watched(prefill)
    two[0].send(subscribe())
    until(lambda: watched.hold.subscribed, "the only reader")
    watched.finish(5)
    two[0].receive(wire.Ready)
    assert verdict(two[0], "raw")
    assert watched.hold.delivered


def test_a_reader_that_asks_again_counts_once_and_with_its_last_word(
    prefill: Rank, two: tuple[raw_peer.RawPeer, raw_peer.RawPeer]
) -> None:
    watched = Watched(prefill)
    come(two[0], "one", 0)
    come(two[0], "one", 2)
    until(lambda: len(watched.seen) == 2, "both to be heard")
    assert not watched.hold.subscribed
    assert watched.hold.first == (2,)


def test_one_that_is_released_before_its_pages_are_held_is_delivered(
    prefill: Rank, two: tuple[raw_peer.RawPeer, raw_peer.RawPeer]
) -> None:
    """A fast decode may release between the last chunk and `hold`."""
    watched = Watched(prefill)
    watched.side.pages_ready("t", [run(0, 5)], last=True)
    two[0].send(subscribe())
    two[0].receive(wire.Ready)
    assert verdict(two[0], "raw")
    assert watched.take()[-1] == Seen("LEFT", 1, subscribed=True, delivered=True)
    watched.side.hold("t", "p-t")
    assert watched.take() == [Seen("ENDED", 1, subscribed=True, delivered=True)]


LEAVES = {
    "gives up": lambda peer: verdict(peer, "one", ok=False),
    "gives up before it was told of any page": lambda peer: verdict(peer, "one", 0, ok=False),
    "dies": lambda peer: peer.reset(),
}


@pytest.mark.parametrize("leaves", LEAVES)
def test_when_one_of_several_leaves_nobody_waits_for_those_who_have_not_come(
    prefill: Rank, two: tuple[raw_peer.RawPeer, raw_peer.RawPeer], leaves: str
) -> None:
    one, other = two
    watched = Watched(prefill)
    watched.finish(5)
    come(one, "one")
    one.receive(wire.Ready)
    LEAVES[leaves](one)
    prefill.await_sent(timeout=8.0)  # the total, 300 s, would end it too
    assert watched.take()[-1] == Seen("ENDED", 1, subscribed=False, delivered=False)
    come(other, "other")
    said = other.receive(wire.Gone)
    assert (said.reader, said.retry) == ("other", False)
    assert said.reason == watched.hold.reason
    assert "gone" in said.reason if leaves == "dies" else said.reason == "decode gave it up"


@pytest.mark.parametrize("leaves", LEAVES)
def test_when_one_of_several_leaves_those_who_came_may_finish_and_it_is_not_delivered(
    prefill: Rank, two: tuple[raw_peer.RawPeer, raw_peer.RawPeer], leaves: str
) -> None:
    """What runs on another rank is not cut off; that rank's framework gives it up, or uses it."""
    one, other = two
    watched = Watched(prefill)
    watched.finish(5)
    for peer, reader in ((one, "one"), (other, "other")):
        come(peer, reader)
        peer.receive(wire.Ready)
    watched.take()
    LEAVES[leaves](one)
    until(lambda: watched.seen, "the change")
    assert prefill.node.prefill.held_pages() == 1
    assert verdict(other, "other")
    prefill.await_sent()
    assert not watched.hold.delivered
    assert [seen.state for seen in watched.take()] == ["HELD", "ENDED"]


def test_one_who_leaves_between_two_chunks_ends_a_hold_that_still_computes(
    prefill: Rank, two: tuple[raw_peer.RawPeer, raw_peer.RawPeer]
) -> None:
    watched = Watched(prefill)
    watched.side.pages_ready("t", [run(0, 5)], last=False)
    come(two[0], "one")
    two[0].receive(wire.Ready)
    assert verdict(two[0], "one", ok=False)
    assert watched.take()[-1] == Seen("LEFT", 1, subscribed=False, delivered=False)
    watched.side.pages_ready("t", [run(1, 6)], last=True)
    watched.side.hold("t", "p-t")
    come(two[1], "other")
    assert two[1].receive(wire.Gone).reason == "decode gave it up"
    prefill.await_sent()


@pytest.mark.parametrize("retry", [False, True])
def test_nothing_is_told_of_a_hold_once_end_has_returned(
    prefill: Rank, two: tuple[raw_peer.RawPeer, raw_peer.RawPeer], retry: bool
) -> None:
    watched = Watched(prefill)
    two[0].send(subscribe())
    until(watched.take, "the reader")
    watched.side.end("t", "preempted", retry=retry)
    assert [seen.state for seen in watched.take()] == ["ENDED"]
    two[0].receive(wire.Gone)
    verdict(two[0], "raw", ok=False)
    verdict(two[0], "late", ok=False)
    two[0].reset()
    until(lambda: len(prefill.node._channels) == 1, "the end of the connection")
    prefill.settle()
    assert not watched.seen


def test_end_of_everything_is_told(prefill: Rank) -> None:
    watched = Watched(prefill)
    watched.side.end_all("the server released its memory")
    assert [(seen.state, watched.hold.reason) for seen in watched.take()] == [
        ("ENDED", "the server released its memory")
    ]


def test_two_decode_ranks_read_one_transfer_each_what_it_wants(
    make: Callable[..., Rank], prefill: Rank, decode: Rank
) -> None:
    other = make("other")
    watched = Watched(prefill)
    decode.fetch(prefill.ref, run(0, 1, 2), readers=2)
    until(lambda: watched.hold.readers, "the first")
    watched.finish(7, 8)
    assert decode.await_end()
    prefill.look()
    assert prefill.sent == []
    other.fetch(prefill.ref, run(1, 3), readers=2)
    assert other.await_end()
    prefill.await_sent()
    assert watched.hold.delivered
    assert (decode.pages(run(0, 1, 2)) == prefill.pages(run(0, 7, 8))).all()
    assert (other.pages(run(1, 3)) == prefill.pages(run(1, 8))).all()


def test_one_reader_more_than_expected_is_waited_for_too(
    prefill: Rank, two: tuple[raw_peer.RawPeer, raw_peer.RawPeer]
) -> None:
    """A decode server may ask for a transfer that another one reads already."""
    watched = Watched(prefill)
    watched.finish(5)
    for peer, reader in zip(two, ("one", "other"), strict=True):
        peer.send(subscribe(reader=reader, readers=1))
        peer.receive(wire.Ready)
    assert verdict(two[0], "one")
    assert not watched.hold.delivered
    assert prefill.node.prefill.held_pages() == 1
    assert verdict(two[1], "other")
    assert watched.hold.delivered
    prefill.await_sent()


def test_what_prefill_did_not_hide_is_counted_from_the_last_page_to_the_last_reader(
    make: Callable[..., Rank],
) -> None:
    clock = Clock()
    prefill = make("prefill", seed=1, now=clock)
    with raw_peer.join(prefill) as one, raw_peer.join(prefill) as other:
        watched = Watched(prefill)
        watched.side.pages_ready("t", [run(0, 5)], last=False)
        clock.advance(5)
        watched.finish(6, first=1)
        for peer, reader in ((one, "one"), (other, "other")):
            come(peer, reader)
            peer.receive(wire.Ready)
            clock.advance(0.25)
            assert verdict(peer, reader)
    prefill.await_sent()
    assert prefill.exposed == [0.5]


def test_neither_a_reader_that_gave_up_nor_one_that_wanted_nothing_counts_as_exposed(
    prefill: Rank, two: tuple[raw_peer.RawPeer, raw_peer.RawPeer]
) -> None:
    watched = Watched(prefill)
    watched.finish(5)
    two[0].send(subscribe())
    two[0].receive(wire.Ready)
    verdict(two[0], "raw", ok=False)
    prefill.await_sent()
    watched.side.open("u", "p-u", "key")
    two[0].send(subscribe("u"))
    two[0].send(release(1, transfer="u"))  # a prefix hit of all of it: before its last page
    assert two[0].receive(wire.Released).held
    watched.side.pages_ready("u", [run(0, 5)], last=True)
    watched.side.hold("u", "p-u")
    prefill.await_sent("u")
    assert prefill.exposed == []
