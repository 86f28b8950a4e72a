"""Rule 3: a verdict is `held` only if the pages were prefill's up to the receipt of Release."""

from __future__ import annotations

import contextlib
import functools
import itertools
import select
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
import raw_peer
from mooncake_engine import Status
from node_stage import SOON, Clock, Rank, run, until
from raw_peer import release, subscribe

from mooncake_connector import wire

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mooncake_connector.holds import Reader


@pytest.fixture
def decode(prefill: Rank) -> Iterator[raw_peer.RawPeer]:
    """A decode node that says what the test says."""
    with raw_peer.join(prefill) as peer:
        yield peer


def read(decode: raw_peer.RawPeer) -> wire.Ready:
    """Subscribe and hear of the pages."""
    decode.send(subscribe())
    return decode.receive(wire.Ready)


def verdict(decode: raw_peer.RawPeer, attempt: int = 1, **fields: object) -> bool:
    """Release and hear the verdict."""
    decode.send(release(attempt, **fields))
    said = decode.receive(wire.Released)
    assert said.attempt == attempt
    return said.held


def test_pages_released_while_they_are_held_were_held(
    prefill: Rank, decode: raw_peer.RawPeer
) -> None:
    prefill.offer(run(0, 1))
    read(decode)
    assert verdict(decode)
    prefill.await_sent()


def test_pages_reused_before_the_release_are_expired_although_every_byte_was_read(
    prefill: Rank, decode: raw_peer.RawPeer
) -> None:
    prefill.offer(run(0, 1))
    read(decode)
    prefill.node.prefill.end("t", "reused", retry=False)
    assert not decode.receive(wire.Gone).retry
    assert not verdict(decode)
    prefill.await_sent()


def test_a_real_decode_throws_expired_bytes_away(
    make: Callable[..., Rank], prefill: Rank, caplog: pytest.LogCaptureFixture
) -> None:
    other = make("other")
    other.faults.hold()
    prefill.offer(run(0, 1))
    other.fetch(prefill.ref, run(0, 1))
    other.faults.wait_held()
    prefill.node.prefill.end("t", "the server's cache was reset", retry=False)
    other.faults.release()
    assert not other.await_end()
    assert other.failures == {"gone": 1}
    assert "the server's cache was reset" in caplog.text


def test_the_first_verdict_stays_whatever_happens_later(
    prefill: Rank, decode: raw_peer.RawPeer
) -> None:
    prefill.offer(run(0, 1))
    read(decode)
    assert verdict(decode)
    assert verdict(decode)  # again, of the ended attempt
    prefill.node.prefill.end("t", "reused", retry=False)
    assert verdict(decode)
    prefill.await_sent()  # and freed once: the stage looks at the end


def test_a_verdict_of_expired_stays_expired(prefill: Rank, decode: raw_peer.RawPeer) -> None:
    prefill.offer(run(0, 1))
    read(decode)
    prefill.node.prefill.end("t", "reused", retry=False)
    decode.receive(wire.Gone)
    assert not verdict(decode)
    prefill.offer(run(0, 2))  # the same id for another request
    assert not verdict(decode)
    prefill.look()
    assert prefill.sent == ["p-t"]  # of the first: the second is still held
    prefill.sent.clear()


def test_a_release_of_what_never_was_is_expired(prefill: Rank, decode: raw_peer.RawPeer) -> None:
    assert not verdict(decode, 3)
    prefill.offer(run(0, 1))
    read(decode)
    assert not verdict(decode, 3)  # of an attempt to come
    assert not verdict(decode, 1, transfer="other")
    assert prefill.node.prefill.held_pages() == 1


def test_pages_released_before_the_request_finished_are_freed_once_it_is_held(
    prefill: Rank, decode: raw_peer.RawPeer
) -> None:
    prefill.compute(run(0, 1))
    read(decode)
    assert verdict(decode)
    prefill.look()
    assert prefill.sent == []  # vLLM asserts that only held requests are reported
    prefill.node.prefill.hold("t", "p-t")
    prefill.look()
    assert prefill.sent == ["p-t"]


def test_pages_of_a_request_that_is_not_held_are_never_reported(
    prefill: Rank, decode: raw_peer.RawPeer
) -> None:
    prefill.compute(run(0, 1))
    read(decode)
    prefill.node.prefill.end("t", "aborted", retry=False)
    decode.receive(wire.Gone)
    assert not verdict(decode)
    prefill.look()
    assert prefill.sent == []


def test_giving_up_before_subscribing_frees_the_pages(
    prefill: Rank, decode: raw_peer.RawPeer
) -> None:
    prefill.offer(run(0, 1))
    decode.send(release(0, ok=False))
    prefill.await_sent()


def test_giving_up_before_prefill_has_heard_of_the_request_frees_its_pages(
    prefill: Rank, decode: raw_peer.RawPeer
) -> None:
    decode.send(release(0, ok=False))
    until(lambda: prefill.node.prefill._parking._parked, "the parked release")
    prefill.offer(run(0, 1))
    prefill.await_sent()


def test_giving_up_a_preempted_attempt_gives_up_the_next_one_too(
    prefill: Rank, decode: raw_peer.RawPeer
) -> None:
    """An abort crosses the notice of a preemption: it names an attempt that is over."""
    prefill.compute(run(0, 1))
    read(decode)
    prefill.node.prefill.end("t", "preempted", retry=True)
    prefill.offer(run(0, 2))
    decode.send(release(1, ok=False))
    prefill.await_sent()


def test_giving_up_between_two_attempts_gives_up_the_next_one(
    prefill: Rank, decode: raw_peer.RawPeer
) -> None:
    prefill.compute(run(0, 1))
    read(decode)
    prefill.node.prefill.end("t", "preempted", retry=True)
    decode.receive(wire.Gone)
    assert not verdict(decode, 1, ok=False)
    prefill.offer(run(0, 2))
    prefill.await_sent()


def test_giving_up_while_waiting_for_the_next_attempt_gives_it_up(
    prefill: Rank, decode: raw_peer.RawPeer
) -> None:
    prefill.compute(run(0, 1))
    read(decode)
    prefill.node.prefill.end("t", "preempted", retry=True)
    decode.send(subscribe(), release(0, ok=False))
    until(lambda: len(prefill.node.prefill._parking._parked["t"]) == 2, "both to be parked")
    prefill.offer(run(0, 2))
    prefill.await_sent()


def test_one_who_gave_up_and_asks_again_is_told_so(prefill: Rank, decode: raw_peer.RawPeer) -> None:
    prefill.node.prefill.open("t", "p-t", "key")
    decode.send(subscribe(reader="other"), release(0, ok=False), subscribe())
    decode.receive(wire.Released)
    assert "raw released it" in decode.receive(wire.Gone).reason
    assert prefill.readers() == 2  # and the other one is still waited for


def test_a_repeated_subscription_is_told_all_pages_again_and_counts_once(
    prefill: Rank, decode: raw_peer.RawPeer
) -> None:
    prefill.offer(run(0, 1, 2))
    assert read(decode) == read(decode)
    assert verdict(decode)
    prefill.await_sent()


def test_a_reader_is_told_of_no_page_before_the_first_that_it_wants(
    prefill: Rank, decode: raw_peer.RawPeer
) -> None:
    prefill.offer(run(0, 5, 6, 7))
    decode.send(subscribe(first=(1,)))
    (pages,) = decode.receive(wire.Ready).pages
    told = wire.unpack_pages(pages)
    assert (told.first, told.ids.tolist()) == (1, [6, 7])


def test_pages_are_kept_until_every_reader_has_released_them(
    prefill: Rank, decode: raw_peer.RawPeer
) -> None:
    prefill.offer(run(0, 1))
    decode.send(subscribe(readers=2))
    decode.receive(wire.Ready)
    assert verdict(decode)
    assert prefill.node.prefill.held_pages() == 1  # the second reader has not even come yet
    decode.send(subscribe(readers=2, reader="second"))
    decode.receive(wire.Ready)
    assert verdict(decode, reader="second")
    prefill.await_sent()


def test_a_grant_is_over_for_servers_of_bytes_before_end_returns(
    make: Callable[..., Rank],
) -> None:
    prefill, decode = make("prefill", seed=1, protocol="tcp"), make("decode", protocol="tcp")
    prefill.offer(run(0, 1))
    with raw_peer.join(prefill) as peer:
        grant = read(peer).grant
        segment = decode.engine.open_segment(prefill.engine.record())
        rows = [(decode.layout.groups[0][0].address, prefill.layout.groups[0][0].address, 64)]
        assert decode.engine.submit("read", segment, rows, grant=grant).wait(10).ok
        prefill.node.prefill.end("t", "reused", retry=False)
        assert decode.engine.submit("read", segment, rows, grant=grant).wait(10).status is (
            Status.REFUSED
        )
    prefill.await_sent()


def test_a_verdict_and_an_end_wait_for_each_other(make: Callable[..., Rank]) -> None:
    """The lock stands for the other one being at work; unlocked, both take microseconds."""
    prefill = make("prefill", seed=1, heartbeat_interval_s=30.0)  # so that no Ping comes
    side = prefill.node.prefill
    prefill.offer(run(0, 1))
    prefill.offer(run(0, 2), transfer="other")
    ending = threading.Thread(target=side.end, args=("other", "reused"), kwargs={"retry": False})
    with raw_peer.join(prefill) as decode:
        read(decode)
        with side._lock:
            ending.start()
            decode.send(release(1))
            ending.join(0.2)
            assert ending.is_alive()
            assert not select.select([decode.socket], [], [], 0.2)[0]
        ending.join(SOON)
        assert decode.receive(wire.Released).held


def test_no_verdict_is_held_once_end_has_returned(make: Callable[..., Rank]) -> None:
    """Ends race with releases; what `end` left undecided must come out `expired`."""
    prefill = make("prefill", seed=1)
    side = prefill.node.prefill
    undecided: set[str] = set()
    held: set[str] = set()
    with raw_peer.join(prefill) as peer, racing() as race:
        channel = next(iter(prefill.node._channels))
        stop = time.monotonic() + SOON / 2
        rounds = itertools.count()
        # Both orders have to come, which of two threads is first is the system's choice.
        while (n := next(rounds)) < 500 or not (undecided and held):
            assert time.monotonic() < stop, f"{len(undecided)} ends and {len(held)} releases first"
            name = f"t{n}"
            side.open(name, name, "key")
            side.on_message(channel, subscribe(name))
            readers = side._live[name].readers

            def end(name: str = name, readers: dict[str, Reader] = readers) -> None:
                side.end(name, "reused", retry=False)
                if readers["raw"].held is None:
                    undecided.add(name)

            race(end, functools.partial(side.on_message, channel, release(1, name)))
            if next_verdict(peer).held:
                held.add(name)
    assert not undecided & held


@contextlib.contextmanager
def racing() -> Iterator[Callable[..., None]]:
    """Runs two functions at the same time, with threads that change as often as can be."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as pool:

            def race(*rivals: Callable[[], None]) -> None:
                line = threading.Barrier(2)

                def start(rival: Callable[[], None]) -> None:
                    line.wait(SOON)
                    rival()

                for _ in pool.map(start, rivals):
                    pass

            yield race
    finally:
        sys.setswitchinterval(before)


def next_verdict(peer: raw_peer.RawPeer) -> wire.Released:
    while True:
        said = peer.receive(wire.Message)
        if isinstance(said, wire.Released):
            return said


def test_a_hold_that_nobody_releases_ends_with_its_total_and_says_so_once(
    make: Callable[..., Rank], caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    prefill = make("prefill", seed=1, now=clock, request_timeout_s=300.0)
    prefill.offer(run(0, 1))
    with raw_peer.join(prefill) as decode:
        read(decode)
        clock.advance(301)
        assert "nobody released it within 300 s" in decode.receive(wire.Gone).reason
        assert not verdict(decode)
    prefill.await_sent()
    assert prefill.failures == {"hold_timeout": 1}
    assert caplog.text.count("nobody released it") == 1


def test_a_prompt_that_computes_longer_than_its_total_is_given_up_once_and_not_reported(
    make: Callable[..., Rank], caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    prefill = make("prefill", seed=1, now=clock, request_timeout_s=300.0)
    prefill.node.prefill.open("t", "p-t", "key")
    with raw_peer.join(prefill) as decode:
        decode.send(subscribe())
        until(prefill.readers, "the reader")
        clock.advance(301)
        decode.receive(wire.Gone)
        decode.send(subscribe("later"))  # a few more looks at the clock pass
        until(lambda: prefill.node.prefill._parking._parked, "the later subscription to be parked")
        clock.advance(31)
        assert "not told of transfer later" in decode.receive(wire.Gone).reason
    until(lambda: not prefill.node._channels, "the end of the connection")
    prefill.settle()
    prefill.look()
    assert prefill.sent == []
    assert prefill.failures == {"hold_timeout": 1}  # its reader was told, so it is not lost
    assert caplog.text.count("nobody released it") == 1
    prefill.node.prefill.hold("t", "p-t")
    prefill.await_sent()
