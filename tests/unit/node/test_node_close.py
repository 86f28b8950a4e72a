"""A node that is closed touches no page, leaves nothing open, and tells its peers by hanging up."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

import pytest
import raw_peer
from node_stage import Rank, run

from mooncake_connector.errors import ConnectorError

if TYPE_CHECKING:
    from collections.abc import Callable


def test_closing_a_decode_that_reads_waits_for_its_reads(
    prefill: Rank, decode: Rank, caplog: pytest.LogCaptureFixture
) -> None:
    decode.faults.hold(stubborn=True)
    prefill.offer(run(0, 1))
    decode.fetch(prefill.ref, run(0, 1))
    decode.faults.wait_held()
    batch = decode.inside().batch
    closing = threading.Thread(target=decode.node.close)
    closing.start()
    closing.join(0.3)  # it would take a few milliseconds
    assert closing.is_alive()
    assert batch.poll() is None
    decode.faults.release()
    closing.join(10)
    assert not closing.is_alive()
    assert batch.poll() is not None
    prefill.await_sent()
    assert not [r for r in caplog.records if r.levelno > logging.WARNING]


def test_closing_a_prefill_that_is_read_fails_the_reader(
    prefill: Rank, decode: Rank, caplog: pytest.LogCaptureFixture
) -> None:
    decode.faults.hold()
    prefill.offer(run(0, 1))
    decode.fetch(prefill.ref, run(0, 1))
    decode.faults.wait_held()
    prefill.close()
    assert not decode.await_end()
    assert decode.failures == {"prefill_gone": 1}
    assert not [r for r in caplog.records if r.levelno > logging.WARNING]


def test_closing_amid_a_hundred_requests_leaves_nothing_open(
    make: Callable[..., Rank], caplog: pytest.LogCaptureFixture
) -> None:
    """The fixture of all tests looks for threads, sockets and names in /dev/shm."""
    prefill, decode = make("prefill", seed=1, protocol="tcp"), make("decode", protocol="tcp")
    decode.faults.hold(after=20)
    with raw_peer.join(prefill), raw_peer.connect(prefill):  # and two who only sit there
        for n in range(100):
            prefill.offer(run(0, n % 32), transfer=f"t{n}")
            decode.fetch(prefill.ref, run(0, n % 32), transfer=f"t{n}", request=f"d{n}")
        decode.faults.wait_held()
        decode.close()
        prefill.close()
    assert not [r for r in caplog.records if r.levelno > logging.WARNING]


def test_closing_while_a_connection_is_being_made_leaves_nothing_open(
    prefill: Rank, decode: Rank
) -> None:
    with raw_peer.RawPrefill(prefill) as raw:
        decode.fetch(raw.ref, run(0, 1))
        with raw.accept() as peer:
            decode.close()
            assert peer.is_closed()
    decode.look()


def test_a_closed_node_ignores_what_comes_and_closes_again(prefill: Rank, decode: Rank) -> None:
    decode.node.close()
    decode.fetch(prefill.ref, run(0, 1))
    decode.node.cancel("d")
    decode.node.claim("t", prefill.ref)
    decode.node.close()
    prefill.node.close()
    prefill.offer(run(0, 1))
    prefill.node.prefill.end("t", "too late", retry=False)
    prefill.node.close()


def test_a_control_port_that_is_taken_is_named_and_nothing_stays_open(
    make: Callable[..., Rank], prefill: Rank
) -> None:
    port = int(prefill.node.address.rpartition(":")[2])
    with pytest.raises(ConnectorError, match=f"port {port}: .* set engine.host and control_port"):
        make("second", control_port=port)
