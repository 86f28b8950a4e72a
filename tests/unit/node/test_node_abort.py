"""An abort is reported once, in any state, and never while an own read runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import raw_peer
from mooncake_engine import Status
from node_stage import Rank, run, until

from mooncake_connector import wire
from mooncake_connector.session import FetchState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PAGE = (wire.pack_pages(run(0, 3)),)
READY = wire.Ready(transfer_id="t", attempt=1, reader="", grant=b"", pages=PAGE, last=True)
GONE = wire.Gone(transfer_id="t", attempt=1, reader="", reason="over", retry=False)
AGAIN = wire.Gone(transfer_id="t", attempt=1, reader="", reason="preempted", retry=True)


@pytest.fixture
def prefill_says(prefill: Rank, decode: Rank) -> Iterator[raw_peer.RawPeer]:
    """A fetch that has subscribed at a prefill node which says what the test says."""
    with raw_peer.RawPrefill(prefill) as server:
        decode.fetch(server.ref, run(0, 1))
        with server.join() as peer:
            peer.receive(wire.Subscribe)
            yield peer


def reach(decode: Rank, peer: raw_peer.RawPeer, state: FetchState) -> None:
    """Bring the fetch into a state."""
    match state:
        case FetchState.READING:
            peer.send(READY)
            decode.faults.wait_held()  # a read that no lane took yet would end at once
        case FetchState.RESTARTING:
            peer.send(READY)
            decode.faults.wait_held()
            peer.send(AGAIN)
        case FetchState.FAILING | FetchState.ABORTING:
            peer.send(READY)
            decode.faults.wait_held()
            peer.send(GONE)
            if state is FetchState.ABORTING:
                decode.node.cancel("d")
        case FetchState.REFUSED:
            decode.faults.fail(Status.REFUSED, "the grant ended")
            peer.send(READY)
        case FetchState.CONFIRMING:
            decode.faults.release()
            peer.send(READY)
            peer.receive(wire.Release)
    until(lambda: decode.inside().state is state, f"the fetch to be {state.name}")


@pytest.mark.parametrize("state", [s for s in FetchState if s is not FetchState.ENDED])
def test_an_abort_is_reported_once_and_after_the_last_own_read(
    decode: Rank, prefill_says: raw_peer.RawPeer, state: FetchState
) -> None:
    decode.faults.hold(stubborn=True)  # the read ends when the test says so, cancelled or not
    reach(decode, prefill_says, state)
    reading = decode.inside().batch is not None
    assert reading is (state.name in {"READING", "RESTARTING", "FAILING", "ABORTING"})
    decode.node.cancel("d")
    decode.settle()
    decode.look()
    assert decode.received == ([] if reading else ["d"])
    if reading:
        before = decode.pages(run(0, 1))
        assert not before.any()
        decode.faults.release()
    decode.await_end()
    if state is not FetchState.ABORTING:  # which began as a failure
        assert decode.failed == {}
    said = prefill_says.receive(wire.Release)
    assert not said.ok
    # Whatever comes late changes nothing and is reported no more: the stage counts at the end.
    prefill_says.send(READY, GONE, AGAIN)
    decode.node.cancel("d")
    decode.settle()


def test_an_abort_before_prefill_is_reached_is_reported_and_reaches_prefill_later(
    prefill: Rank, decode: Rank
) -> None:
    prefill.offer(run(0, 1))
    decode.fetch(prefill.ref, run(0, 1))
    decode.node.cancel("d")
    decode.await_end()
    assert decode.failed == {}
    prefill.await_sent()


def test_an_abort_of_a_real_read_frees_both_sides(make: Callable[..., Rank]) -> None:
    prefill, decode = make("prefill", seed=1, protocol="tcp"), make("decode", protocol="tcp")
    decode.faults.hold()
    prefill.offer(run(0, 1))
    decode.fetch(prefill.ref, run(0, 1))
    decode.faults.wait_held()
    decode.node.cancel("d")
    decode.await_end()
    prefill.await_sent()
    # The own pages are the framework's again: nothing comes late.
    assert not decode.pages(run(0, 1)).any()
    assert decode.whole == 0  # it is reported like one that was received, and counted as none


def test_the_abort_of_a_request_that_is_unknown_or_ended_does_nothing(
    prefill: Rank, decode: Rank
) -> None:
    decode.node.cancel("never")
    prefill.offer(run(0, 1))
    decode.fetch(prefill.ref, run(0, 1))
    assert decode.await_end()
    decode.node.cancel("d")
    decode.settle()
    decode.look()
    assert decode.received == ["d"]
    assert decode.whole == 1
