"""Rules 4 and 5 on prefill's side: who is unknown, silent, gone or senseless keeps no pages."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import pytest
import raw_peer
from node_stage import FAST, Clock, Rank, run, until
from raw_peer import release, subscribe

from mooncake_connector import wire

if TYPE_CHECKING:
    from collections.abc import Callable


def test_a_subscription_to_an_unknown_transfer_is_served_when_it_becomes_known(
    prefill: Rank,
) -> None:
    with raw_peer.join(prefill) as decode:
        decode.send(subscribe())
        until(lambda: prefill.node.prefill._parking._parked, "the subscription to be parked")
        prefill.offer(run(0, 1))
        decode.receive(wire.Ready)
        assert not prefill.node.prefill._parking._parked


def test_an_unknown_transfer_is_refused_after_the_grace_and_not_before(
    make: Callable[..., Rank],
) -> None:
    clock = Clock()
    prefill = make("prefill", seed=1, now=clock, unknown_transfer_grace_s=30.0)
    with raw_peer.join(prefill) as decode:
        decode.send(subscribe("first"))
        until(lambda: prefill.node.prefill._parking._parked, "the first to be parked")
        clock.advance(29)
        prefill.node.prefill.sweep()
        assert set(prefill.node.prefill._parking._parked) == {"first"}
        decode.send(subscribe("second"))
        until(lambda: len(prefill.node.prefill._parking._parked) == 2, "the second to be parked")
        clock.advance(2)
        said = decode.receive(wire.Gone)
        assert (said.transfer_id, said.attempt, said.retry) == ("first", 0, False)
        assert "not told of transfer first within 30 s" in said.reason
        assert set(prefill.node.prefill._parking._parked) == {"second"}


def test_a_reader_that_is_reset_gives_the_pages_back_at_once(prefill: Rank) -> None:
    prefill.offer(run(0, 1))
    with raw_peer.join(prefill) as decode:
        decode.send(subscribe())
        decode.receive(wire.Ready)
        decode.reset()
    # Silence would be noticed after a minute.
    prefill.await_sent(timeout=8.0)
    assert prefill.failures == {"reader_gone": 1}


def test_a_reader_that_falls_silent_gives_the_pages_back_when_it_counts_as_dead(
    make: Callable[..., Rank],
) -> None:
    prefill = make("prefill", seed=1, **FAST)
    prefill.offer(run(0, 1))
    with raw_peer.join(prefill) as decode:
        decode.send(subscribe())
        decode.receive(wire.Ready)
        prefill.await_sent(timeout=8.0)
        assert decode.is_closed()
    assert prefill.failures == {"reader_gone": 1}


def test_a_slow_reader_that_lives_keeps_the_pages(make: Callable[..., Rank]) -> None:
    """Liveness is not progress: heartbeats come from the node's thread while a read takes long."""
    prefill, decode = make("prefill", seed=1, **FAST), make("decode", **FAST)
    decode.faults.hold()
    prefill.offer(run(0, 1))
    decode.fetch(prefill.ref, run(0, 1))
    decode.faults.wait_held()
    channel = next(iter(prefill.node._channels))
    start = time.monotonic()
    until(lambda: time.monotonic() - start > 2 * FAST["peer_dead_after_s"], "two such times")
    assert channel in prefill.node._channels
    decode.faults.release()
    assert decode.await_end()
    prefill.await_sent()


def test_a_claim_keeps_pages_for_one_who_queues(prefill: Rank, decode: Rank) -> None:
    decode.node.claim("t", prefill.ref)
    prefill.offer(run(0, 1))
    until(prefill.claims, "the claim")
    decode.fetch(prefill.ref, run(0, 1))
    assert decode.await_end()
    prefill.await_sent()


def test_a_claim_whose_node_died_keeps_nothing(prefill: Rank) -> None:
    prefill.offer(run(0, 1))
    with raw_peer.join(prefill) as decode:
        decode.send(wire.Claim(transfer_id="t"))
        until(prefill.claims, "the claim")
        decode.reset()
    prefill.await_sent(timeout=8.0)


@pytest.mark.parametrize("message", [wire.Claim(transfer_id="t"), subscribe()])
def test_one_who_died_before_prefill_heard_of_the_request_keeps_nothing(
    prefill: Rank, message: wire.Message
) -> None:
    with raw_peer.join(prefill) as decode:
        decode.send(message)
        until(lambda: prefill.node.prefill._parking._parked, "the message to be parked")
        decode.reset()
    until(lambda: not prefill.node._channels, "the end of the connection")
    prefill.offer(run(0, 1))
    prefill.look()
    assert prefill.sent == ["p-t"]


def test_one_who_died_early_does_not_take_the_pages_from_one_who_lives(prefill: Rank) -> None:
    with raw_peer.join(prefill) as dead:
        dead.send(wire.Claim(transfer_id="t"))
        until(lambda: prefill.node.prefill._parking._parked, "the claim to be parked")
        dead.reset()
    until(lambda: not prefill.node._channels, "the end of the connection")
    with raw_peer.join(prefill) as alive:
        alive.send(subscribe())
        until(lambda: len(prefill.node.prefill._parking._parked["t"]) == 2, "both to be parked")
        prefill.offer(run(0, 1))
        alive.receive(wire.Ready)
        alive.send(release(1))
        assert alive.receive(wire.Released).held


@pytest.mark.parametrize("dies", ["before", "after"])
def test_one_who_read_a_preempted_attempt_and_died_does_not_hold_the_next(
    prefill: Rank, dies: str
) -> None:
    prefill.compute(run(0, 1))
    with raw_peer.join(prefill) as decode:
        decode.send(subscribe())
        decode.receive(wire.Ready)
        prefill.node.prefill.end("t", "preempted", retry=True)
        if dies == "before":
            decode.reset()
            until(lambda: not prefill.node._channels, "the end of the connection")
        prefill.offer(run(0, 2))
        if dies == "after":
            prefill.look()
            assert prefill.sent == []
            decode.reset()
        prefill.await_sent(timeout=8.0)


def test_a_dead_reader_leaves_the_pages_to_the_others(prefill: Rank) -> None:
    prefill.offer(run(0, 1))
    with raw_peer.join(prefill) as dead, raw_peer.join(prefill) as alive:
        for name, peer in (("dead", dead), ("alive", alive)):
            peer.send(subscribe(reader=name, readers=2))
            peer.receive(wire.Ready)
        dead.reset()
        prefill.await_failure("reader_gone")
        assert prefill.sent == []
        alive.send(release(1, reader="alive"))
        assert alive.receive(wire.Released).held
    prefill.await_sent()


GARBAGE = {
    "no message": b"\0\0\0\x02\xc1\xc1",
    "text that is no text": b"\0\0\0\x1a\x82\xa4type\xa5claim\xabtransfer_id\xa1\xff",
    "too long": b"\x7f\xff\xff\xff",
    "empty": b"\0\0\0\0",
    "a message for decode": wire.encode(
        wire.Gone(transfer_id="t", attempt=1, reader="", reason="", retry=False)
    ),
    "a second hello": b"",  # filled in below
}


@pytest.mark.parametrize("what", GARBAGE)
def test_a_senseless_message_closes_its_connection_and_no_other(
    prefill: Rank, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    prefill.offer(run(0, 1))
    prefill.offer(run(0, 2), transfer="other")
    with raw_peer.join(prefill) as bad, raw_peer.join(prefill) as good:
        bad.send(subscribe())
        bad.receive(wire.Ready)
        good.send(subscribe("other"))
        good.receive(wire.Ready)
        bad.socket.sendall(GARBAGE[what] or wire.encode(raw_peer.hello(prefill)))
        assert bad.is_closed()
        prefill.await_sent()  # nothing is kept for it
        good.send(release(1, "other"))
        assert good.receive(wire.Released).held
    prefill.await_sent("other")
    said = [r for r in caplog.records if "closing the connection with" in r.getMessage()]
    assert len(said) == 1
    assert not [r for r in caplog.records if r.levelno > logging.WARNING]


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        (wire.encode(wire.Ping()), "it began with Ping instead of Hello"),
        (b"GET /query HTTP/1.1\r\nHost: prefill\r\n\r\n", "a message of 1195725856 bytes"),
        (b"\0\0\0\x01\xc1", "not a message of wire version 2"),
    ],
)
def test_one_who_does_not_begin_with_hello_is_refused(
    prefill: Rank, first: bytes, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with raw_peer.connect(prefill) as stranger:
        stranger.socket.sendall(first)
        assert reason in stranger.receive(wire.Refused).reason
        assert stranger.is_closed()
    assert reason in caplog.text


def test_one_who_says_nothing_is_refused_in_time(
    make: Callable[..., Rank], caplog: pytest.LogCaptureFixture
) -> None:
    prefill = make("prefill", engine={"connect_timeout_s": 0.2})
    with raw_peer.connect(prefill) as stranger:
        assert "Hello" in stranger.receive(wire.Refused).reason
        assert stranger.is_closed()
    assert "within 0.2 s" in caplog.text


def test_one_whose_heart_is_too_slow_is_refused_before_it_is_taken_for_dead(
    prefill: Rank,
) -> None:
    with raw_peer.connect(prefill) as decode:
        decode.send(raw_peer.hello(prefill, heartbeat_s=60.0))
        reason = decode.receive(wire.Refused).reason
        assert "heartbeat_interval_s 60" in reason
        assert "peer_dead_after_s 60" in reason


def test_connections_that_are_reset_as_soon_as_they_are_made_harm_nobody(
    prefill: Rank, decode: Rank, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(50):
        raw_peer.connect(prefill).reset()
    prefill.offer(run(0, 1))
    decode.fetch(prefill.ref, run(0, 1))
    assert decode.await_end()
    assert not [r for r in caplog.records if r.levelno > logging.WARNING]
