"""Giving up all that a node reads, and hearing that a prefill node is lost."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest
import raw_peer
from node_stage import SOON, Rank, run, until

from mooncake_connector import wire
from mooncake_connector.peers import PeerRef
from mooncake_connector.session import FetchState

if TYPE_CHECKING:
    from collections.abc import Callable


def test_draining_ends_reads_and_reports_every_request_once(prefill: Rank, decode: Rank) -> None:
    decode.faults.hold()
    for request in ("reads", "waits"):
        decode.fetch(prefill.ref, run(0, 1), request=request, transfer=request)
    prefill.offer(run(0, 7), transfer="reads")
    decode.faults.wait_held()
    prefill.node.prefill.open("waits", "p-waits", "key")
    until(lambda: prefill.readers("waits"), "the one that waits")
    assert decode.node.drain(SOON)
    for request in ("reads", "waits"):
        decode.await_end(request)
    assert decode.failed == dict.fromkeys(("reads", "waits"), "the KV cache's memory is taken away")
    assert not decode.pages(run(0, 1)).any()
    prefill.await_sent("reads")
    prefill.node.prefill.hold("waits", "p-waits")
    prefill.await_sent("waits")


def test_draining_ends_a_request_whose_verdict_is_awaited(prefill: Rank, decode: Rank) -> None:
    with raw_peer.RawPrefill(prefill) as raw:
        decode.fetch(raw.ref, run(0, 1))
        with raw.join() as peer:
            page = (wire.pack_pages(run(0, 7)),)
            peer.send(
                wire.Ready(transfer_id="t", attempt=1, reader="", grant=b"", pages=page, last=True)
            )
            peer.receive(wire.Subscribe)
            assert peer.receive(wire.Release).ok
            assert decode.inside().state is FetchState.CONFIRMING
            assert decode.node.drain(SOON)
            assert not peer.receive(wire.Release).ok
            assert not decode.await_end()


def test_draining_says_when_a_read_did_not_end_in_time(prefill: Rank, decode: Rank) -> None:
    decode.faults.hold(stubborn=True)
    prefill.offer(run(0, 7))
    decode.fetch(prefill.ref, run(0, 1))
    decode.faults.wait_held()
    batch = decode.inside().batch
    assert batch is not None
    assert not decode.node.drain(0.1)
    assert batch.poll() is None  # it was right
    decode.look()
    assert not decode.received
    decode.faults.release()
    assert decode.node.drain(SOON)
    assert batch.poll() is not None
    assert not decode.await_end()


def test_a_node_reads_again_after_it_was_drained(prefill: Rank, decode: Rank) -> None:
    assert decode.node.drain(SOON)
    prefill.offer(run(0, 7))
    decode.fetch(prefill.ref, run(0, 1))
    assert decode.await_end()
    assert (decode.pages(run(0, 1)) == prefill.pages(run(0, 7))).all()


class Losses:
    """What a decode rank is told of lost peers, and what it had reported as failed by then."""

    def __init__(self, make: Callable[..., Rank]) -> None:
        self.told: list[tuple[PeerRef, str, dict[str, str]]] = []
        self.decode = make("decode", on_peer_lost=self._note)

    def _note(self, ref: PeerRef, reason: str) -> None:
        self.told.append((ref, reason, self.decode.node.take_results().failed))

    def one(self) -> tuple[PeerRef, str, dict[str, str]]:
        until(lambda: self.told, "the loss")
        self.decode.settle()
        (told,) = self.told
        return told


@pytest.mark.parametrize("requests", [0, 2])
def test_the_loss_of_a_peer_is_told_behind_the_requests_that_it_fails(
    make: Callable[..., Rank], prefill: Rank, requests: int
) -> None:
    losses = Losses(make)
    with raw_peer.RawPrefill(prefill) as raw:
        losses.decode.node.connect(raw.ref)
        for n in range(requests):
            losses.decode.fetch(raw.ref, run(0, n), request=f"d{n}", transfer=f"t{n}")
        with raw.join() as peer:
            for _ in range(requests):
                peer.receive(wire.Subscribe)
            assert not losses.told
            peer.reset()
        ref, reason, failed = losses.one()
    assert ref == raw.ref
    assert reason.startswith(f"{raw.ref.address} is gone: ")
    assert failed == {f"d{n}": f"prefill {reason}" for n in range(requests)}


def test_a_peer_that_never_came_about_is_told_as_lost(make: Callable[..., Rank]) -> None:
    losses = Losses(make)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        ref = PeerRef(address=f"127.0.0.1:{sock.getsockname()[1]}")
    losses.decode.fetch(ref, run(0, 1))
    told, reason, failed = losses.one()
    assert told == ref
    assert "cannot be reached" in reason
    assert failed == {"d": f"prefill {reason}"}


def test_a_peer_is_lost_once_for_each_connection(make: Callable[..., Rank], prefill: Rank) -> None:
    losses = Losses(make)
    with raw_peer.RawPrefill(prefill) as raw:
        for times in (1, 2):
            losses.decode.fetch(raw.ref, run(0, 1), request=f"d{times}")
            with raw.join() as peer:
                peer.receive(wire.Subscribe)
                peer.reset()
            until(lambda times=times: len(losses.told) == times, "the loss")
    assert [list(failed) for _, _, failed in losses.told] == [["d1"], ["d2"]]
