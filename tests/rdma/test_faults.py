"""Peers that refuse, die or fall silent: each batch ends in its status in time.

One initiator and one target serve all of these tests, so each also shows that they went on after
the faults of those before; a proxy of the control connection makes either of them lie.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest
from control_proxy import ControlProxy
from mooncake_engine import OutOfBounds, PathUnavailable, Status
from mooncake_engine.testing.target import ChildTarget, pattern
from mooncake_engine.transport.rdma.keys import KeyRow
from mooncake_engine.transport.rdma.messages import Keys, Message
from mooncake_engine.types import Op, RegionRecord
from rdma_ends import CONNECT_S, IMPATIENT, LENGTH, LIMIT_S, MIB, End, Pair, in_the_middle
from rdma_stage import OURS, THEIRS, config

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


# Keys and bounds: the target's NIC refuses.


def _with_keys(alter: Callable[[KeyRow], KeyRow]) -> Callable[[Message], Message]:
    def altered(message: Message) -> Message:
        if not isinstance(message, Keys):
            return message
        return msgspec.structs.replace(message, rows=tuple(map(alter, message.rows)))

    return altered


def test_a_wrong_key_is_refused_and_the_right_one_is_asked_for(pair: Pair) -> None:
    with ControlProxy(pair.theirs.record) as proxy:
        proxy.to_initiator = _with_keys(
            lambda row: KeyRow(row.address, row.length, tuple(key ^ 0x5A for key in row.keys))
        )
        with pair.ours.open(proxy.record) as segment:
            for op in Op:
                end = pair.ours.move(op, segment, (0, 0, MIB))
                assert end.status is Status.REFUSED, end
                assert "remote access error" in end.error
            pair.check_untouched(pair.ours, pair.theirs)
            proxy.to_initiator = lambda message: message
            pair.check_exact(segment)


def test_bytes_behind_a_registration_are_refused(pair: Pair) -> None:
    """The record and the keys both say that there is more."""
    record = pair.theirs.record
    longer = RegionRecord(record.regions[0].address, LENGTH + MIB, "cpu")
    with ControlProxy(msgspec.structs.replace(record, regions=(longer,))) as proxy:
        proxy.to_initiator = _with_keys(lambda row: KeyRow(row.address, row.length + MIB, row.keys))
        with pair.ours.open(proxy.record) as segment:
            for op in Op:
                end = pair.ours.move(op, segment, (0, LENGTH, 4096))
                assert end.status is Status.REFUSED, end
                end = pair.ours.move(op, segment, (0, LENGTH - 100, 4096))
                assert end.status is Status.REFUSED, end
            pair.check_untouched(pair.ours, pair.theirs)
            pair.check_exact(segment)


def test_our_own_memory_that_is_registered_no_more_cannot_be_used(pair: Pair) -> None:
    more = np.zeros(MIB, np.uint8)
    region = pair.ours.engine.register_memory(more)
    with pair.ours.open(pair.theirs.record) as segment:
        there = segment.record.regions[0].address
        batch = pair.ours.engine.submit(Op.READ, segment, [(region.address, there, MIB)])
        assert batch.wait(LIMIT_S).ok
        assert np.array_equal(more, pair.theirs.memory[:MIB])
        pair.ours.engine.unregister_memory(region)
        with pytest.raises(OutOfBounds, match="this engine registered"):
            pair.ours.engine.submit(Op.READ, segment, [(region.address, there, MIB)])


# Memory that the target takes back.


@pytest.fixture
def lent(pair: Pair) -> Iterator[End]:  # noqa: ARG001 - it serves on afterwards
    """A target whose memory may be taken back, with the initiator of all."""
    with End(THEIRS[:1]) as theirs:
        theirs.memory[:] = pattern(5, theirs.memory.size)
        yield theirs


def test_memory_taken_back_is_refused_and_when_it_is_lent_again_it_is_read(
    pair: Pair, lent: End
) -> None:
    with pair.ours.open(lent.record) as segment:
        assert pair.ours.move(Op.READ, segment, (0, 0, MIB)).ok
        lent.engine.unregister_memory(lent.address)
        pair.fill()
        for op in (Op.WRITE, Op.READ):
            end = pair.ours.move(op, segment, (0, 0, MIB))
            assert end.status is Status.REFUSED, end
            assert "unregistered" in end.error
        pair.check_untouched(pair.ours)
        assert np.array_equal(lent.memory, pattern(5, LENGTH))
        lent.engine.register_memory(lent.memory)
        assert pair.ours.move(Op.READ, segment, (0, 0, MIB)).ok
        assert np.array_equal(pair.ours.memory[:MIB], lent.memory[:MIB])


def test_memory_lent_anew_between_two_batches_is_read_with_its_new_key(
    pair: Pair, lent: End
) -> None:
    """Requests with the old key are on both queue pairs when the first of them is refused."""
    with pair.ours.open(lent.record) as segment:
        for round_ in range(3):
            pair.fill()
            end = pair.ours.move(Op.READ, segment, (0, 0, LENGTH))
            assert end.ok, (round_, end.error)
            assert np.array_equal(pair.ours.memory, lent.memory)
            lent.engine.unregister_memory(lent.address)
            lent.engine.register_memory(lent.memory)


def test_memory_taken_back_in_the_middle_of_batches_is_refused(pair: Pair, lent: End) -> None:
    with pair.ours.open(lent.record) as segment:
        with in_the_middle(pair.ours, segment) as batches:
            lent.engine.unregister_memory(lent.address)
        ends = {batch.wait(0).status for batch in batches}
        assert ends == {Status.OK, Status.REFUSED}
        pair.fill()
        lent.memory[:] = 9  # nothing reads it any more, nothing writes ours
        pair.check_serves()
        pair.fill()
        assert pair.ours.move(Op.READ, segment, (0, 0, 1)).status is Status.REFUSED
        pair.check_untouched(pair.ours)


# Peers that die, close, stop, or are cut off.


@pytest.fixture
def child(pair: Pair) -> Iterator[ChildTarget]:  # noqa: ARG001 - it serves on afterwards
    """A target in another process, with the initiator of all."""
    with ChildTarget(config(*THEIRS[:1], **IMPATIENT), LENGTH) as target:
        target.fill(5)
        yield target


def test_a_killed_peer_ends_batches_in_time_and_touches_nothing_afterwards(
    pair: Pair, child: ChildTarget
) -> None:
    with pair.ours.open(child.record) as segment:
        with in_the_middle(pair.ours, segment) as batches:
            child.kill()
        for batch in batches:
            assert batch.wait(0).status in {Status.OK, Status.PEER_GONE}, batch.wait(0)
        assert batches[-1].wait(0).status is Status.PEER_GONE
        pair.fill()
        end = pair.ours.move(Op.WRITE, segment, (0, 0, LENGTH))
        assert end.status is Status.PEER_GONE
    with pytest.raises(PathUnavailable, match="cannot connect"):
        pair.ours.engine.open_segment(child.record)
    pair.check_serves()
    pair.fill()
    pair.check_untouched(pair.ours)


def test_a_stopped_peer_is_read_all_the_same_and_a_new_one_waits_no_longer_than_said(
    pair: Pair, child: ChildTarget
) -> None:
    """Its NIC serves what is connected; nobody there answers a new connection."""
    with pair.ours.open(child.record) as segment:
        assert pair.ours.move(Op.READ, segment, (0, 0, 1)).ok
        child.stop()
        end = pair.ours.move(Op.READ, segment, (0, 0, LENGTH))
        assert end.ok, end.error
        assert np.array_equal(pair.ours.memory, pattern(5, LENGTH))
    began = time.monotonic()
    with pytest.raises(PathUnavailable, match="no greeting"):
        pair.ours.engine.open_segment(child.record)
    assert time.monotonic() - began < CONNECT_S + LIMIT_S
    child.resume()
    with pair.ours.open(child.record) as segment:
        assert pair.ours.move(Op.READ, segment, (0, 0, LENGTH)).ok


def test_a_peer_that_closes_in_the_middle_ends_batches_in_time(pair: Pair, lent: End) -> None:
    with pair.ours.open(lent.record) as segment:
        with in_the_middle(pair.ours, segment) as batches:
            lent.engine.close()
        assert batches[-1].wait(0).status is Status.PEER_GONE
        assert pair.ours.move(Op.READ, segment, (0, 0, 1)).status is Status.PEER_GONE


def test_a_control_connection_that_is_cut_ends_batches_and_a_new_one_serves(pair: Pair) -> None:
    """Who is cut off cannot say that it takes memory back, so nobody may use that any more."""
    with ControlProxy(pair.theirs.record) as proxy:
        with pair.ours.open(proxy.record) as segment:
            with in_the_middle(pair.ours, segment) as batches:
                proxy.cut()
            end = batches[-1].wait(0)
            assert end.status is Status.PEER_GONE
            assert "control connection" in end.error
        with pair.ours.open(proxy.record) as segment:
            pair.check_exact(segment)


def test_closing_our_engine_in_the_middle_ends_everything_and_lets_go_of_memory(
    pair: Pair,
) -> None:
    with End(OURS[:1]) as ours:
        segment = ours.engine.open_segment(pair.theirs.record)
        with in_the_middle(ours, segment) as batches:
            ours.engine.close()
            ours.memory[:] = 7
        assert {batch.wait(0).status for batch in batches} == {Status.OK, Status.CANCELLED}
        pair.check_serves()
        assert (ours.memory == 7).all()
