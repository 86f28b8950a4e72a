"""The iovec arrays that sockets and process_vm calls are fed with."""

from __future__ import annotations

import errno
import socket
from typing import TYPE_CHECKING

import numpy as np
import pytest
from mooncake_engine.iovec import IOV_MAX, Message, address_of, advance, iovecs
from mooncake_engine.types import uint64s

if TYPE_CHECKING:
    from mooncake_engine.iovec import Iovecs


def three_runs() -> Iovecs:
    return iovecs(uint64s([1000, 5000, 9000]), uint64s([10, 20, 30]))


def as_pairs(runs: Iovecs) -> list[tuple[int, int]]:
    return [(int(base), int(length)) for base, length in runs.tolist()]


@pytest.mark.parametrize(
    ("count", "left"),
    [
        (0, [(1000, 10), (5000, 20), (9000, 30)]),
        (9, [(1009, 1), (5000, 20), (9000, 30)]),
        (10, [(5000, 20), (9000, 30)]),
        (11, [(5001, 19), (9000, 30)]),
        (59, [(9029, 1)]),
        (60, []),
    ],
)
def test_advance_leaves_exactly_the_bytes_that_did_not_move(
    count: int, left: list[tuple[int, int]]
) -> None:
    assert as_pairs(advance(three_runs(), count)) == left


def test_advancing_twice_is_advancing_by_the_sum() -> None:
    assert as_pairs(advance(advance(three_runs(), 13), 18)) == as_pairs(advance(three_runs(), 31))


def test_a_message_gathers_and_scatters_in_the_order_of_the_runs() -> None:
    source = np.arange(100, dtype=np.uint8)
    sink = np.zeros(100, np.uint8)
    left, right = socket.socketpair()
    with left, right:
        out = iovecs(address_of(source) + uint64s([90, 0, 50]), uint64s([5, 1, 4]))
        into = iovecs(address_of(sink) + uint64s([7, 20]), uint64s([2, 8]))
        assert Message().send(left.fileno(), out, 0) == 10
        assert Message().receive(right.fileno(), into, socket.MSG_WAITALL) == 10
    assert sink[7:9].tolist() == [90, 91]
    assert sink[20:28].tolist() == [92, 93, 94, 0, 50, 51, 52, 53]
    assert int(sink.sum()) == 90 + 91 + 92 + 93 + 94 + 0 + 50 + 51 + 52 + 53


def test_more_runs_than_the_kernel_takes_are_moved_in_several_calls() -> None:
    count = IOV_MAX + 5
    source = np.arange(count, dtype=np.uint32).view(np.uint8)
    runs = iovecs(address_of(source) + 4 * np.arange(count, dtype=np.uint64), uint64s([4] * count))
    left, right = socket.socketpair()
    with left, right:
        first = Message().send(left.fileno(), runs, 0)
        assert first == 4 * IOV_MAX
        assert Message().send(left.fileno(), advance(runs, first), 0) == 20
        assert right.recv(4 * count, socket.MSG_WAITALL) == source.tobytes()


def test_a_failing_call_raises_what_libc_said() -> None:
    left, right = socket.socketpair()
    right.close()
    with left, pytest.raises(BrokenPipeError) as caught:
        Message().send(left.fileno(), iovecs(uint64s([1]), uint64s([0])), socket.MSG_NOSIGNAL)
    assert caught.value.errno == errno.EPIPE


def test_memory_that_is_not_mapped_is_an_error_and_not_a_crash() -> None:
    left, right = socket.socketpair()
    with left, right, pytest.raises(OSError, match="Bad address"):
        Message().send(left.fileno(), iovecs(uint64s([8]), uint64s([64])), socket.MSG_NOSIGNAL)
