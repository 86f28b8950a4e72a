"""What the native binding hands to a provider's post_send, as the provider sees it.

The provider is a stand-in: a function that walks the chain it is given by pointers, as a NIC's
does, and says what it was told to. The queue pair and all before it are the real ones.
"""

from __future__ import annotations

import ctypes
import errno
from typing import TYPE_CHECKING

import numpy as np
import pytest
from mooncake_engine.transport.rdma.verbs import abi
from mooncake_engine.transport.rdma.verbs.base import Opcode, QueueCaps, VerbsError, Work
from mooncake_engine.transport.rdma.verbs.native_queues import NativeQueuePair

if TYPE_CHECKING:
    from collections.abc import Callable

READ, WRITE, WRITE_WITH_IMM = 4, 0, 1
SIGNALED, INLINE = 2, 8
CAPS = QueueCaps(max_send_wr=8, max_recv_wr=8, max_send_sge=3, max_recv_sge=1, max_inline=64)


class Entry(ctypes.Structure):
    """struct ibv_sge, written down from the manual and not taken from verbs/abi.py."""

    _fields_ = (
        ("address", ctypes.c_uint64),
        ("length", ctypes.c_uint32),
        ("key", ctypes.c_uint32),
    )


class Request(ctypes.Structure):
    """struct ibv_send_wr, ditto."""


Request._fields_ = (
    ("wr_id", ctypes.c_uint64),
    ("next", ctypes.POINTER(Request)),
    ("entries", ctypes.POINTER(Entry)),
    ("entry_count", ctypes.c_int),
    ("opcode", ctypes.c_int),
    ("flags", ctypes.c_uint),
    ("imm", ctypes.c_uint8 * 4),
    ("remote_address", ctypes.c_uint64),
    ("rkey", ctypes.c_uint32),
    ("unused", ctypes.c_uint8 * 76),
)

Seen = tuple[int, int, int, int, int, list[tuple[int, int, int]]]


class Provider:
    """Notes each request of each post; refuses from the `room`-th on with `refusal`."""

    def __init__(self) -> None:
        self.posts: list[list[Seen]] = []
        self.imm: list[bytes] = []
        self.room, self.refusal, self.names_it = 1 << 30, errno.ENOMEM, True
        self._queue_pair = ctypes.create_string_buffer(160)
        ctypes.c_uint32.from_buffer(self._queue_pair, abi.QP_NUM).value = 77
        signature = (ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
        self._post_send = ctypes.CFUNCTYPE(*signature)(self._send)

    def pair(self, caps: QueueCaps = CAPS) -> NativeQueuePair:
        address = ctypes.addressof(self._queue_pair)
        return NativeQueuePair(ctypes.CDLL(None), self._functions, address, caps)

    def _functions(self, offset: int, *signature: object) -> Callable[..., int]:
        assert offset in {abi.CONTEXT_POST_SEND, abi.CONTEXT_POST_RECV}
        address = ctypes.cast(self._post_send, ctypes.c_void_p).value
        return ctypes.PYFUNCTYPE(*signature)(address)

    def _send(self, queue_pair: int, first: int, bad: int) -> int:
        assert queue_pair == ctypes.addressof(self._queue_pair)
        self.posts.append([])
        at = ctypes.cast(first, ctypes.POINTER(Request))
        while at:
            one = at.contents
            if len(self.posts[-1]) == self.room:
                refused = ctypes.addressof(one) if self.names_it else None
                ctypes.c_void_p.from_address(bad).value = refused
                return self.refusal
            entries = [
                (entry.address, entry.length, entry.key) for entry in one.entries[: one.entry_count]
            ]
            seen = (one.wr_id, one.opcode, one.flags, one.remote_address, one.rkey, entries)
            self.posts[-1].append(seen)
            self.imm.append(bytes(one.imm))
            at = one.next
        return 0


def work_of(counts: list[int]) -> tuple[Work, np.ndarray, np.ndarray]:
    """Requests of so many entries, each value its own; and both keys' columns."""
    entry_counts = np.array(counts, np.int64)
    entries = int(entry_counts.sum())
    work = Work(
        remote=np.uint64(1 << 47) + np.arange(len(counts), dtype=np.uint64) * np.uint64(4096),
        sge_first=np.cumsum(entry_counts) - entry_counts,
        sge_count=entry_counts,
        local=np.uint64((1 << 64) - 4096) + np.arange(entries, dtype=np.uint64),
        local_length=np.arange(1, entries + 1, dtype=np.uint32),
    )
    lkeys = np.uint32(0xFFFF0000) + np.arange(entries, dtype=np.uint32)
    return work, lkeys, np.uint32(0x80000000) + np.arange(len(counts), dtype=np.uint32)


def expected(counts: list[int], rows: range, opcode: int, first_id: int) -> list[Seen]:
    seen: list[Seen] = []
    for number, row in enumerate(rows):
        before = sum(counts[:row])
        entries = [
            ((1 << 64) - 4096 + entry, entry + 1, 0xFFFF0000 + entry)
            for entry in range(before, before + counts[row])
        ]
        seen.append(
            (first_id + number, opcode, 0, (1 << 47) + row * 4096, 0x80000000 + row, entries)
        )
    return seen


def with_flags(seen: list[Seen], flags: list[int]) -> list[Seen]:
    return [(*one[:2], flag, *one[3:]) for one, flag in zip(seen, flags, strict=True)]


COUNTS = [1, 3, 2, 1, 3, 1, 2]


@pytest.mark.parametrize(("opcode", "code"), [(Opcode.READ, READ), (Opcode.WRITE, WRITE)])
def test_the_chain_has_every_value_of_the_work(opcode: Opcode, code: int) -> None:
    provider = Provider()
    work, lkeys, rkeys = work_of(COUNTS)
    accepted = provider.pair().post(
        opcode, work, slice(0, 7), lkeys, rkeys, wr_id=(1 << 63) + 5, signal_every=100, inline=0
    )
    assert accepted == 7
    seen = expected(COUNTS, range(7), code, (1 << 63) + 5)
    assert provider.posts == [with_flags(seen, [0, 0, 0, 0, 0, 0, SIGNALED])]


def test_part_of_the_work_is_posted_as_if_it_were_all() -> None:
    provider = Provider()
    work, lkeys, rkeys = work_of(COUNTS)
    pair = provider.pair()
    for rows in (slice(0, 3), slice(3, 4), slice(4, 7), slice(0, 7)):
        pair.post(Opcode.READ, work, rows, lkeys, rkeys, wr_id=9, signal_every=2, inline=0)
    for rows, seen in zip(
        (range(3), range(3, 4), range(4, 7), range(7)), provider.posts, strict=True
    ):
        flags = [SIGNALED * (row % 2 == 1) for row in range(len(rows))]
        flags[-1] = SIGNALED
        assert seen == with_flags(expected(COUNTS, rows, READ, 9), flags)


def test_small_writes_are_inline_by_the_sum_of_their_entries() -> None:
    provider = Provider()
    work, lkeys, rkeys = work_of(COUNTS)  # sums: 1, 9, 11, 7, 27, 11, 25
    pair = provider.pair()
    pair.post(Opcode.WRITE, work, slice(0, 7), lkeys, rkeys, wr_id=0, signal_every=7, inline=11)
    pair.post(Opcode.READ, work, slice(0, 7), lkeys, rkeys, wr_id=0, signal_every=7, inline=11)
    writes, reads = provider.posts
    assert [one[2] for one in writes] == [INLINE, INLINE, INLINE, INLINE, 0, INLINE, SIGNALED]
    assert [one[2] for one in reads] == [0, 0, 0, 0, 0, 0, SIGNALED]


@pytest.mark.parametrize("room", [0, 1, 6])
def test_a_full_queue_tells_how_many_it_took(room: int) -> None:
    provider = Provider()
    provider.room = room
    work, lkeys, rkeys = work_of(COUNTS)
    pair = provider.pair()
    post = (Opcode.READ, work, slice(0, 7), lkeys, rkeys)
    assert pair.post(*post, wr_id=0, signal_every=1, inline=0) == room
    provider.room = 7  # the chain is whole again, and the next post right
    assert pair.post(*post, wr_id=0, signal_every=1, inline=0) == 7
    assert provider.posts[1] == with_flags(expected(COUNTS, range(7), READ, 0), [SIGNALED] * 7)


@pytest.mark.parametrize("names_it", [True, False])
def test_a_post_that_failed_is_an_error_that_names_the_queue_pair(names_it: bool) -> None:
    provider = Provider()
    provider.room, provider.refusal, provider.names_it = 0, errno.EINVAL, names_it
    work, lkeys, rkeys = work_of(COUNTS)
    post = (Opcode.READ, work, slice(0, 7), lkeys, rkeys)
    with pytest.raises(VerbsError, match="7 READs to queue pair 77") as failed:
        provider.pair().post(*post, wr_id=0, signal_every=1, inline=0)
    assert failed.value.errno == errno.EINVAL


def test_an_imm_goes_in_network_order_and_leaves_no_trace_in_what_follows() -> None:
    provider = Provider()
    pair = provider.pair()
    pair.post_imm(0x01020304, b"abc", (1 << 64) - 1, 0xFFFFFFFF, wr_id=3)
    pair.post_imm(0, b"", 5, 6, wr_id=4)
    work, lkeys, rkeys = work_of(COUNTS)
    pair.post(Opcode.WRITE, work, slice(0, 7), lkeys, rkeys, wr_id=0, signal_every=9, inline=0)
    (full,), (empty,), after = provider.posts
    assert full[:5] == (3, WRITE_WITH_IMM, SIGNALED | INLINE, (1 << 64) - 1, 0xFFFFFFFF)
    assert [length for _, length, _ in full[5]] == [3]
    assert empty == (4, WRITE_WITH_IMM, SIGNALED | INLINE, 5, 6, [])
    assert provider.imm[:2] == [b"\1\2\3\4", b"\0\0\0\0"]
    assert after == with_flags(expected(COUNTS, range(7), WRITE, 0), [0] * 6 + [SIGNALED])
