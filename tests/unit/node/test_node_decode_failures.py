"""Rule 5 on decode's side: whatever prefill does, a fetch ends in time and says why."""

from __future__ import annotations

import logging
import socket
import time
from typing import TYPE_CHECKING

import msgspec
import pytest
import raw_peer
from mooncake_engine import Status
from node_stage import FAST, Clock, Rank, run, until

from mooncake_connector import wire
from mooncake_connector.layout import CacheLayout
from mooncake_connector.peers import PeerRef

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def raw(prefill: Rank) -> Iterator[raw_peer.RawPrefill]:
    """A prefill node that says what the test says."""
    with raw_peer.RawPrefill(prefill) as server:
        yield server


def failed(decode: Rank, kind: str, says: str, caplog: pytest.LogCaptureFixture) -> None:
    """The fetch "d" fails, is counted as `kind`, and its one line in the log says why."""
    assert not decode.await_end()
    assert decode.failures == {kind: 1}
    lines = [r.getMessage() for r in caplog.records if "was not received" in r.getMessage()]
    assert len(lines) == 1
    assert "KV of request d (transfer t from" in lines[0]
    assert says in lines[0]


def ready(*ids: int, **fields: object) -> wire.Ready:
    page = wire.pack_pages(run(0, *ids))
    like = wire.Ready(transfer_id="t", attempt=1, reader="", grant=b"", pages=(page,), last=True)
    return msgspec.structs.replace(like, **fields)


def test_a_closed_port_fails_at_once(decode: Rank, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    decode.fetch(PeerRef(address=f"127.0.0.1:{port}"), run(0, 1))
    failed(decode, "prefill_gone", f"127.0.0.1:{port} cannot be reached", caplog)


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:0", "[::1]:x", "127.0.0.1:70000"])
def test_an_address_that_is_none_fails_at_once(
    decode: Rank, address: str, caplog: pytest.LogCaptureFixture
) -> None:
    decode.fetch(PeerRef(address=address), run(0, 1))
    failed(decode, "prefill_gone", f"{address!r} is not host:port", caplog)


def test_a_prefill_that_never_answers_fails_in_the_connect_timeout(
    make: Callable[..., Rank], raw: raw_peer.RawPrefill, caplog: pytest.LogCaptureFixture
) -> None:
    decode = make("decode", engine={"connect_timeout_s": 0.3})
    decode.fetch(raw.ref, run(0, 1))
    with raw.accept():
        failed(decode, "prefill_gone", "did not answer within 0.3 s", caplog)


def test_a_prefill_that_hangs_up_instead_of_answering_is_said_to(
    decode: Rank, raw: raw_peer.RawPrefill, caplog: pytest.LogCaptureFixture
) -> None:
    decode.fetch(raw.ref, run(0, 1))
    with raw.accept() as peer:
        peer.receive(wire.Hello)
    failed(decode, "prefill_gone", "closed the connection before it said welcome", caplog)


def test_a_prefill_that_falls_silent_fails_when_it_counts_as_dead(
    make: Callable[..., Rank], raw: raw_peer.RawPrefill, caplog: pytest.LogCaptureFixture
) -> None:
    decode = make("decode", **FAST)
    decode.fetch(raw.ref, run(0, 1))
    with raw.join():
        failed(decode, "prefill_gone", "is gone: it was silent for 0.5 s", caplog)


def test_a_prefill_that_is_reset_fails_at_once(
    decode: Rank, raw: raw_peer.RawPrefill, caplog: pytest.LogCaptureFixture
) -> None:
    decode.fetch(raw.ref, run(0, 1))
    with raw.join() as peer:
        peer.receive(wire.Subscribe)
        peer.reset()
        start = time.monotonic()
        failed(decode, "prefill_gone", "is gone", caplog)
    assert time.monotonic() - start < 8  # silence would take a minute


def test_a_prefill_that_is_lost_while_it_is_read_is_reported_after_the_read(
    decode: Rank, raw: raw_peer.RawPrefill, caplog: pytest.LogCaptureFixture
) -> None:
    decode.faults.hold(stubborn=True)
    decode.fetch(raw.ref, run(0, 1))
    with raw.join() as peer:
        peer.send(ready(3))
        decode.faults.wait_held()
        peer.reset()
    until(lambda: decode.inside().error, "decode to notice")
    decode.look()
    assert not decode.received
    decode.faults.release()
    failed(decode, "prefill_gone", "is gone", caplog)


def test_a_prefill_that_gives_no_verdict_counts_as_expired_in_time(
    make: Callable[..., Rank], raw: raw_peer.RawPrefill, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    decode = make("decode", now=clock)
    decode.fetch(raw.ref, run(0, 1))
    with raw.join() as peer:
        peer.send(ready(3))
        peer.receive(wire.Subscribe)
        peer.receive(wire.Release)
        clock.advance(61)
        failed(decode, "timeout", "still confirming after 60 s", caplog)
        assert not peer.receive(wire.Release).ok


def test_a_request_that_waits_longer_than_its_total_fails(
    make: Callable[..., Rank], raw: raw_peer.RawPrefill, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    decode = make("decode", now=clock, request_timeout_s=300.0)
    decode.fetch(raw.ref, run(0, 1))
    with raw.join() as peer:
        peer.receive(wire.Subscribe)
        clock.advance(301)
        failed(decode, "timeout", "still waiting after 300 s", caplog)
        assert not peer.receive(wire.Release).ok


def test_a_read_that_fails_fails_its_request_and_frees_prefills_pages(
    prefill: Rank, decode: Rank, caplog: pytest.LogCaptureFixture
) -> None:
    prefill.offer(run(0, 1))
    decode.faults.fail(Status.FAILED, "the wire is cut")
    decode.fetch(prefill.ref, run(0, 1))
    failed(decode, "read", "reading by loopback: the wire is cut", caplog)
    prefill.await_sent()


def test_a_read_that_is_refused_without_a_word_fails_in_time(
    make: Callable[..., Rank], raw: raw_peer.RawPrefill, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    decode = make("decode", now=clock)
    decode.faults.fail(Status.REFUSED, "no such grant")
    decode.fetch(raw.ref, run(0, 1))
    with raw.join() as peer:
        peer.send(ready(3))
        until(lambda: decode.inside().error, "the refusal")
        clock.advance(61)
        failed(decode, "read", "no such grant", caplog)


def test_a_refused_read_fails_with_prefills_word_for_why(
    decode: Rank, raw: raw_peer.RawPrefill, caplog: pytest.LogCaptureFixture
) -> None:
    decode.faults.fail(Status.REFUSED, "no such grant")
    decode.fetch(raw.ref, run(0, 1))
    with raw.join() as peer:
        peer.send(ready(3))
        until(lambda: decode.inside().error, "the refusal")
        peer.send(
            wire.Gone(transfer_id="t", attempt=1, reader="", reason="cache reset", retry=False)
        )
        failed(decode, "gone", "prefill gave it up: cache reset", caplog)


def wrong_welcomes(raw: raw_peer.RawPrefill) -> dict[str, tuple[wire.Message, str]]:
    right = raw.welcome()
    layer = right.layout.groups[0][0]
    below = msgspec.structs.replace(layer, address=-8)
    lost = msgspec.structs.replace(right.segment, endpoints={})
    return {
        "another message": (wire.Ping(), "answered Hello with Ping"),
        "a refusal": (wire.Refused(reason="too busy"), "refused us: too busy"),
        "another cache": (
            raw.welcome(spec=msgspec.structs.replace(right.spec, dtype="int8")),
            "dtype: prefill has 'int8', decode has 'uint32'",
        ),
        "fewer groups": (raw.welcome(layout=CacheLayout(())), "[2] layers by group"),
        "fewer layers": (raw.welcome(layout=CacheLayout(((layer,),))), "the addresses of [1]"),
        "no addresses": (raw.welcome(layout=CacheLayout(((below, layer),))), "that are none"),
        "no path": (raw.welcome(segment=lost), "no path to"),
        "a slow heart": (raw.welcome(heartbeat_s=60.0), "heartbeat_interval_s 60"),
    }


@pytest.mark.parametrize(
    "which",
    [
        "another message",
        "a refusal",
        "another cache",
        "fewer groups",
        "fewer layers",
        "no addresses",
        "no path",
        "a slow heart",
    ],
)
def test_a_wrong_welcome_fails_what_waits_for_it_and_is_told_why(
    decode: Rank, raw: raw_peer.RawPrefill, which: str, caplog: pytest.LogCaptureFixture
) -> None:
    welcome, says = wrong_welcomes(raw)[which]
    decode.fetch(raw.ref, run(0, 1))
    with raw.accept() as peer:
        peer.receive(wire.Hello)
        peer.send(welcome)
        failed(decode, "prefill_gone", says, caplog)
        assert peer.is_closed()
    assert not [r for r in caplog.records if r.levelno > logging.WARNING]


@pytest.mark.parametrize(
    ("bad", "kind", "says"),
    [
        (ready(3, pages=()), "prefill_gone", "pages of 0 groups, this cache has 1"),
        (ready(3, pages=(wire.Pages(0, b"\0\0\0"),)), "prefill_gone", "3 bytes of ids"),
        (wire.Claim(transfer_id="t"), "prefill_gone", "an unexpected Claim"),
        (ready(32), "read", "remote page id 32 is outside the cache of 32 pages"),
    ],
)
def test_a_senseless_message_of_prefill_harms_only_its_own_requests(
    prefill: Rank,
    decode: Rank,
    raw: raw_peer.RawPrefill,
    caplog: pytest.LogCaptureFixture,
    bad: wire.Message,
    kind: str,
    says: str,
) -> None:
    decode.faults.hold()
    decode.fetch(prefill.ref, run(0, 2), request="good", transfer="good")
    prefill.offer(run(0, 7), transfer="good")
    decode.faults.wait_held()
    decode.fetch(raw.ref, run(0, 1))
    with raw.join() as peer:
        peer.send(bad)
        failed(decode, kind, says, caplog)
        if kind == "prefill_gone":
            assert peer.is_closed()
    decode.faults.release()
    assert decode.await_end("good")
    assert (decode.pages(run(0, 2)) == prefill.pages(run(0, 7))).all()


def test_a_new_request_connects_anew_after_a_loss(
    prefill: Rank, decode: Rank, raw: raw_peer.RawPrefill
) -> None:
    decode.fetch(raw.ref, run(0, 1))
    with raw.join() as peer:
        peer.reset()
        assert not decode.await_end()
    decode.fetch(raw.ref, run(0, 1), request="again")
    with raw.join() as peer:
        reader = peer.receive(wire.Subscribe).reader
        peer.send(ready(3))
        peer.receive(wire.Release)
        peer.send(wire.Released(transfer_id="t", attempt=1, reader=reader, held=True))
        assert decode.await_end("again")
    assert (decode.pages(run(0, 1)) == prefill.pages(run(0, 3))).all()


def test_losing_one_connection_to_an_engine_leaves_another_to_it_working(
    prefill: Rank, decode: Rank, raw: raw_peer.RawPrefill
) -> None:
    """Two control endpoints lead to one segment: the loss of one must not close it."""
    decode.fetch(raw.ref, run(0, 1))
    prefill.offer(run(0, 7), transfer="good")
    with raw.join() as peer:
        peer.receive(wire.Subscribe)
        decode.node.connect(prefill.ref)
        until(lambda: prefill.node._channels, "the second connection")
        until(lambda: len(decode.node._peers._users) == 1, "the shared segment")
        until(lambda: sum(decode.node._peers._users.values()) == 2, "its two users")
        peer.reset()
        assert not decode.await_end()
    decode.fetch(prefill.ref, run(0, 2), request="good", transfer="good")
    assert decode.await_end("good")


def test_the_segment_of_a_lost_prefill_is_closed(decode: Rank, raw: raw_peer.RawPrefill) -> None:
    decode.fetch(raw.ref, run(0, 1))
    with raw.join() as peer:
        peer.receive(wire.Subscribe)
        segment = decode.inside().peer.segment
        assert not segment.closed
    assert not decode.await_end()
    until(lambda: segment.closed, "the segment to be closed")
