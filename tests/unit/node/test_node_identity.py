"""Rules 1 and 2: pages belong to one start of prefill, one attempt, one prompt, one cache."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import msgspec
import pytest
import raw_peer
from node_stage import Clock, Rank, run, until
from raw_peer import release, subscribe

from mooncake_connector import wire

if TYPE_CHECKING:
    from collections.abc import Callable


def preempt(prefill: Rank, transfer: str = "t") -> None:
    """What vLLM's scheduler does: the blocks go to others now, the request starts over later."""
    prefill.node.prefill.end(transfer, "prefill preempted it", retry=True)
    for layer in prefill.cache[0]:
        layer[:16] = 0xDEAD


def test_a_restarted_prefill_is_refused_naming_both_incarnations(
    prefill: Rank, decode: Rank, caplog: pytest.LogCaptureFixture
) -> None:
    prefill.offer(run(0, 1))
    old = msgspec.structs.replace(prefill.ref, incarnation="before")
    decode.fetch(old, run(0, 1))
    assert not decode.await_end()
    assert decode.failures == {"prefill_gone": 1}
    assert f"expects incarnation before, this node restarted as {prefill.node.incarnation}" in (
        caplog.text
    )
    assert decode.faults.moves == 0


def test_an_attempt_that_is_preempted_while_it_is_read_gives_the_next_ones_bytes(
    prefill: Rank, decode: Rank
) -> None:
    own = run(0, 1, 2, 3)
    decode.faults.hold()
    prefill.node.prefill.open("t", "p-t", "key")
    decode.fetch(prefill.ref, own)
    prefill.node.prefill.pages_ready("t", [run(0, 3, 4)], last=False)
    decode.faults.wait_held()
    preempt(prefill)
    until(lambda: decode.inside().attempt == 0, "decode to start over")
    decode.faults.release()
    prefill.offer(run(0, 20, 21, 22))
    assert decode.await_end()
    assert (decode.pages(own) == prefill.pages(run(0, 20, 21, 22))).all()
    prefill.await_sent()
    assert decode.failures == {}


@pytest.mark.parametrize("protocol", ["loopback", "tcp"])
def test_a_read_that_the_preempted_prefill_refuses_waits_for_the_next_attempt(
    make: Callable[..., Rank], protocol: str
) -> None:
    """The refusal comes by the data lane and may overtake the notice on the control connection."""
    prefill, decode = make("prefill", seed=1, protocol=protocol), make("decode", protocol=protocol)
    prefill.node.prefill.open("t", "p-t", "key")
    decode.faults.hold()
    decode.fetch(prefill.ref, run(0, 1, 2))
    prefill.node.prefill.pages_ready("t", [run(0, 3, 4)], last=True)
    decode.faults.wait_held()
    with prefill.node.prefill._lock:  # as `end` does it, up to the notice
        prefill.engine.revoke(prefill.node.prefill._live["t"].grant)
        decode.faults.release()
        until(lambda: decode.engine.statistics(), "the refused read")
        decode.settle()
    decode.look()
    assert not decode.received
    preempt(prefill)
    prefill.offer(run(0, 21, 22))
    assert decode.await_end()
    assert (decode.pages(run(0, 1, 2)) == prefill.pages(run(0, 21, 22))).all()


def test_an_attempt_that_is_preempted_between_two_chunks_leaves_no_page_behind(
    prefill: Rank, decode: Rank
) -> None:
    own = run(0, 1, 2, 3)
    prefill.node.prefill.open("t", "p-t", "key")
    decode.fetch(prefill.ref, own)
    prefill.node.prefill.pages_ready("t", [run(0, 3, 4)], last=False)
    until(lambda: decode.inside().arrived == 2, "two pages")
    until(lambda: decode.inside().batch is None, "the end of their read")
    preempt(prefill)
    prefill.offer(run(0, 20, 21, 22))
    assert decode.await_end()
    assert (decode.pages(own) == prefill.pages(run(0, 20, 21, 22))).all()


def test_an_attempt_that_is_preempted_after_the_last_byte_is_read_again_with_its_whole_time(
    make: Callable[..., Rank],
) -> None:
    """Release and the notice cross: the verdict on the old attempt comes behind the notice."""
    clock = Clock()
    prefill = make("prefill", seed=1)
    decode = make("decode", now=clock, request_timeout_s=300.0)
    with raw_peer.RawPrefill(prefill) as raw:
        decode.fetch(raw.ref, run(0, 5))
        with raw.join() as peer:
            peer.receive(wire.Subscribe)
            peer.send(ready(1))
            reader = peer.receive(wire.Release).reader
            peer.send(
                wire.Gone(transfer_id="t", attempt=1, reader="", reason="preempted", retry=True),
                wire.Released(transfer_id="t", attempt=1, reader=reader, held=False),
            )
            assert peer.receive(wire.Subscribe).remaining_s == pytest.approx(300.0)
            peer.send(ready(2))
            assert peer.receive(wire.Release).attempt == 2
            peer.send(wire.Released(transfer_id="t", attempt=2, reader=reader, held=True))
            assert decode.await_end()
    assert decode.bytes_read == 2 * decode.pages(run(0, 5)).nbytes


def test_a_next_attempt_that_offers_less_is_not_filled_up_with_the_last_ones_pages(
    prefill: Rank, decode: Rank
) -> None:
    prefill.compute(run(0, 3, 4))
    decode.faults.hold()
    decode.fetch(prefill.ref, run(0, 1, 2))
    decode.faults.wait_held()
    preempt(prefill)
    decode.faults.release()
    prefill.offer(run(0, 20))
    assert not decode.await_end()
    assert decode.failures == {"short": 1}


def ready(attempt: int) -> wire.Ready:
    page = wire.pack_pages(run(0, 1))
    return wire.Ready(
        transfer_id="t", attempt=attempt, reader="", grant=b"", pages=(page,), last=True
    )


def test_a_verdict_on_an_earlier_attempt_says_nothing_about_this_one(
    prefill: Rank, decode: Rank
) -> None:
    with raw_peer.RawPrefill(prefill) as raw:
        decode.fetch(raw.ref, run(0, 1))
        with raw.join() as peer:
            reader = peer.receive(wire.Subscribe).reader
            peer.send(ready(2))
            peer.receive(wire.Release)
            peer.send(wire.Released(transfer_id="t", attempt=1, reader=reader, held=True))
            peer.send(wire.Released(transfer_id="t", attempt=2, reader="other", held=True))
            peer.send(wire.Released(transfer_id="t", attempt=2, reader=reader, held=False))
            assert not decode.await_end()
            assert decode.failures == {"expired": 1}


def test_pages_of_an_earlier_attempt_are_not_read(prefill: Rank, decode: Rank) -> None:
    with raw_peer.RawPrefill(prefill) as raw:
        decode.fetch(raw.ref, run(0, 1, 2))
        with raw.join() as peer:
            peer.receive(wire.Subscribe)
            page = wire.pack_pages(run(0, 7))
            stale = wire.pack_pages(run(1, 8))
            peer.send(
                wire.Ready(
                    transfer_id="t", attempt=2, reader="", grant=b"", pages=(page,), last=False
                ),
                wire.Ready(
                    transfer_id="t", attempt=1, reader="", grant=b"", pages=(stale,), last=True
                ),
            )
            page = wire.pack_pages(run(1, 9))
            peer.send(
                wire.Ready(
                    transfer_id="t", attempt=2, reader="", grant=b"", pages=(page,), last=True
                )
            )
            said = peer.receive(wire.Release)
            peer.send(
                wire.Released(transfer_id="t", attempt=2, reader=said.reader, held=True),
            )
            assert decode.await_end()
    assert (decode.pages(run(0, 1, 2)) == prefill.pages(run(0, 7, 9))).all()


def test_an_ended_attempt_is_remembered_apart_from_the_next(prefill: Rank) -> None:
    prefill.offer(run(0, 1))
    with raw_peer.join(prefill) as decode:
        decode.send(subscribe())
        assert decode.receive(wire.Ready).attempt == 1
        prefill.node.prefill.end("t", "reused", retry=True)
        assert decode.receive(wire.Gone).retry
        prefill.node.prefill.open("t", "p-t2", "key")
        prefill.node.prefill.pages_ready("t", [run(0, 2)], last=True)
        decode.send(release(1))
        said = decode.receive(wire.Released)
        assert (said.attempt, said.held) == (1, False)
        decode.send(subscribe())
        assert decode.receive(wire.Ready).attempt == 2  # alive: attempt 1's release left it alone
        decode.send(release(2))
        assert decode.receive(wire.Released).held


def test_an_ended_transfer_is_answered_until_its_deadline_and_then_unknown(
    make: Callable[..., Rank],
) -> None:
    clock = Clock()
    prefill = make("prefill", seed=1, now=clock, request_timeout_s=300.0)
    prefill.offer(run(0, 1))
    prefill.node.prefill.end("t", "the server's cache was reset", retry=False)
    with raw_peer.join(prefill) as decode:
        decode.send(subscribe())
        assert decode.receive(wire.Gone).reason == "the server's cache was reset"
        clock.advance(301)
        until(lambda: not prefill.node.prefill._tombstones, "the tombstone to be forgotten")
        assert not prefill.node.prefill._attempts
        decode.send(subscribe())
        until(
            lambda: prefill.node.prefill._parking._parked,
            "the subscription to be parked as unknown",
        )


def test_another_prompt_is_refused_before_any_byte_moves(
    prefill: Rank, decode: Rank, caplog: pytest.LogCaptureFixture
) -> None:
    prefill.offer(run(0, 1), key="first prompt")
    decode.fetch(prefill.ref, run(0, 1), key="second prompt")
    assert not decode.await_end()
    assert "its prompt key is first prompt, decode's is second prompt" in caplog.text
    assert decode.failures == {"gone": 1}
    assert decode.faults.moves == 0
    assert not decode.cache[0][0].any()


def test_a_refused_prompt_does_not_take_the_pages_from_the_right_one(
    prefill: Rank, decode: Rank
) -> None:
    prefill.offer(run(0, 1), key="first prompt")
    decode.fetch(prefill.ref, run(0, 1), request="wrong", key="second prompt")
    assert not decode.await_end("wrong")
    decode.fetch(prefill.ref, run(0, 2), request="right", key="first prompt")
    assert decode.await_end("right")
    assert (decode.pages(run(0, 2)) == prefill.pages(run(0, 1))).all()


@pytest.mark.parametrize(
    ("field", "theirs", "ours"),
    [("dtype", "uint32", "float16"), ("model", "tiny", "other"), ("page_size", 4, 8)],
)
def test_another_kind_of_cache_is_refused_with_both_values_on_both_sides(
    make: Callable[..., Rank],
    caplog: pytest.LogCaptureFixture,
    field: str,
    theirs: object,
    ours: object,
) -> None:
    prefill, decode = make("prefill", seed=1), make("decode", spec={field: ours})
    prefill.offer(run(0, 1))
    decode.fetch(prefill.ref, run(0, 1))
    assert not decode.await_end()
    says = f"{field}: prefill has {theirs!r}, decode has {ours!r}"
    by = {record.name for record in caplog.records if says in record.getMessage()}
    assert by == {"mooncake_connector.node", "mooncake_connector.decode"}
    assert decode.faults.moves == 0


def test_another_version_of_the_wire_is_refused(
    prefill: Rank, caplog: pytest.LogCaptureFixture
) -> None:
    with raw_peer.connect(prefill) as peer, caplog.at_level(logging.WARNING):
        peer.send(raw_peer.hello(prefill, version=wire.VERSION + 1))
        reason = peer.receive(wire.Refused).reason
        assert peer.is_closed()
    assert f"wire version {wire.VERSION + 1}, this node {wire.VERSION}" in reason
    assert reason in caplog.text
