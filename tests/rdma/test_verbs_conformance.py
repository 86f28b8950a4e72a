"""What verbs/base.py promises of the data path, kept by the binding under test on real devices.

The binding is MC_VERBS_BINDING's; `scripts/test rdma` runs this with each.
"""

from __future__ import annotations

import select
import threading
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
from harness.verbs_sides import CAPS, LIMITS, Side, binding
from mooncake_engine.transport.rdma.verbs.base import COMPLETION, Opcode, VerbsError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mooncake_engine.transport.rdma.verbs.base import Verbs

SUCCESS, FLUSHED, REMOTE_ACCESS, RETRIES_EXCEEDED = 0, 5, 10, 12
NOT_OUR_MEMORY = {2, 4}  # rxe says operation error, NICs protection error
ERR = 6


@pytest.fixture(scope="module")
def verbs() -> Verbs:
    found = binding()
    assert found.device_names(), "no RDMA device here; run `scripts/test rdma`"
    return found


@pytest.fixture(params=["one device", "two devices"])
def names(verbs: Verbs, request: pytest.FixtureRequest) -> tuple[str, str]:
    """Of our device and the peer's."""
    first, *others = sorted(verbs.device_names())
    return first, first if request.param == "one device" else others[0]


@pytest.fixture
def sides(verbs: Verbs, names: tuple[str, str]) -> Iterator[tuple[Side, Side]]:
    """Connected; psn and contents differ."""
    with Side(verbs, names[0], psn=11) as ours, Side(verbs, names[1], psn=0xABCDEF) as theirs:
        ours.connect(theirs)
        theirs.connect(ours)
        random = np.random.default_rng(1)
        ours.data[:] = random.integers(0, 256, ours.data.size, np.uint8)
        theirs.data[:] = random.integers(0, 256, theirs.data.size, np.uint8)
        yield ours, theirs


@pytest.fixture
def deaf(verbs: Verbs) -> Iterator[tuple[Side, Side]]:
    """The peer does not answer: what is posted stays under way. Four times 1 s until it fails."""
    name = min(verbs.device_names())
    with Side(verbs, name, caps=CAPS._replace(max_send_wr=16)) as ours, Side(verbs, name) as theirs:
        ours.connect(theirs, limits=LIMITS._replace(timeout=18, retry_count=4))
        yield ours, theirs


def test_writes_land_where_they_were_sent_and_nowhere_else(sides: tuple[Side, Side]) -> None:
    ours, theirs = sides
    before = theirs.data.copy()
    rows = [(70_001, [(3, 100), (500_000, 4096), (9, 1)]), (5, [(1000, 64)]), (900_000, [(0, 9)])]
    assert ours.post(Opcode.WRITE, theirs, rows, wr_id=40) == 3
    (end,) = ours.completions(1)
    assert (end["wr_id"], end["status"], end["received"]) == (42, SUCCESS, 0)
    assert end["qp_num"] == ours.pair.number
    expected = before
    for remote, entries in rows:
        for local, length in entries:
            expected[remote : remote + length] = ours.data[local : local + length]
            remote += length
    assert (theirs.data == expected).all()


def test_reads_scatter_into_their_entries_and_nowhere_else(sides: tuple[Side, Side]) -> None:
    ours, theirs = sides
    expected = ours.data.copy()
    rows = [
        (123, [(700, 10), (4096, 65536), (200_000, 1), (3, 33)]),
        (800_000, [(300_000, 70_000)]),
    ]
    assert ours.post(Opcode.READ, theirs, rows) == 2
    assert ours.completions(1)["status"] == SUCCESS
    for remote, entries in rows:
        for local, length in entries:
            expected[local : local + length] = theirs.data[remote : remote + length]
            remote += length
    assert (ours.data == expected).all()


def test_only_the_rows_that_were_named_are_posted(sides: tuple[Side, Side]) -> None:
    ours, theirs = sides
    before = theirs.data.copy()
    rows = [(1000 * row, [(2000 * row, 10), (2000 * row + 500, row + 1)]) for row in range(6)]
    assert ours.post(Opcode.WRITE, theirs, rows, part=slice(2, 4), wr_id=7) == 2
    assert ours.completions(1)["wr_id"] == 8
    changed = set(np.flatnonzero(theirs.data != before) // 1000)
    assert changed == {2, 3}
    for row in (2, 3):
        mine = ours.data[2000 * row : 2000 * row + 10]
        assert (theirs.data[1000 * row : 1000 * row + 10] == mine).all()


def test_every_nth_request_completes_visibly_and_the_last(sides: tuple[Side, Side]) -> None:
    ours, theirs = sides
    rows = [(64 * row, [(64 * row, 64)]) for row in range(10)]
    assert ours.post(Opcode.WRITE, theirs, rows, wr_id=100, signal_every=4) == 10
    assert ours.completions(3)["wr_id"].tolist() == [103, 107, 109]
    # what was posted once has left no flag behind
    assert ours.post(Opcode.READ, theirs, rows, wr_id=1 << 40, signal_every=100) == 10
    assert ours.completions(1)["wr_id"].tolist() == [(1 << 40) + 9]
    time.sleep(0.1)  # nothing more may come
    assert ours.queue.poll(np.zeros(8, COMPLETION)) == 0


def test_a_chain_may_have_as_many_requests_as_the_queue(sides: tuple[Side, Side]) -> None:
    ours, theirs = sides
    count = ours.pair.caps.max_send_wr
    assert count >= CAPS.max_send_wr
    rows = [(32 * row, [(64 * row, 32)]) for row in range(count)]
    for _ in range(3):  # round and round
        assert ours.post(Opcode.WRITE, theirs, rows, wr_id=5) == count
        assert ours.completions(1)["wr_id"] == 5 + count - 1
    wanted = ours.data[: 64 * count].reshape(count, 64)[:, :32]
    assert (theirs.data[: 32 * count].reshape(count, 32) == wanted).all()


def test_inline_data_is_copied_when_posted(sides: tuple[Side, Side]) -> None:
    ours, theirs = sides
    limit = ours.pair.caps.max_inline
    assert limit >= 24
    small = [(10, [(0, 8), (100, 16)])]
    wanted = np.concatenate([ours.data[0:8], ours.data[100:116]])
    # Data that is copied need not be registered: a key that is none does no harm.
    assert ours.post(Opcode.WRITE, theirs, small, lkey=0, inline=24) == 1
    ours.data[:200] = 0
    assert ours.completions(1)["status"] == SUCCESS
    assert (theirs.data[10:34] == wanted).all()
    # One byte more than `inline` is read from memory, where the key does matter.
    assert ours.post(Opcode.WRITE, theirs, small, lkey=0, inline=23) == 1
    assert int(ours.completions(1)["status"][0]) in NOT_OUR_MEMORY


@pytest.mark.parametrize("data", [b"", b"control message"])
def test_a_write_with_imm_arrives_with_its_number(sides: tuple[Side, Side], data: bytes) -> None:
    ours, theirs = sides
    for number, wr_id in ((0x01020304, 31), (0xFFFFFFFE, 32)):
        theirs.pair.post_receive(1 << 33 | wr_id)
        ours.pair.post_imm(number, data, theirs.address + 77, theirs.region.rkey, wr_id=wr_id)
        (sent,), (received,) = ours.completions(1), theirs.completions(1)
        assert (sent["wr_id"], sent["status"], sent["received"]) == (wr_id, SUCCESS, 0)
        assert received["wr_id"] == 1 << 33 | wr_id
        assert (received["status"], received["received"]) == (SUCCESS, 1)
        assert (received["imm"], received["qp_num"]) == (number, theirs.pair.number)
    assert theirs.data[77 : 77 + len(data)].tobytes() == data


def test_sequence_numbers_wrap(verbs: Verbs, names: tuple[str, str]) -> None:
    with Side(verbs, names[0], psn=0xFFFFFE) as ours, Side(verbs, names[1]) as theirs:
        ours.connect(theirs)
        theirs.connect(ours)
        ours.data[:], theirs.data[:] = 1, 2
        for row in range(4):
            ours.post(Opcode.WRITE, theirs, [(row * 5000, [(0, 5000)])])
            assert ours.completions(1)["status"] == SUCCESS
        assert (theirs.data[:20_000] == 1).all()
        assert (theirs.data[20_000:] == 2).all()


def test_a_full_queue_accepts_what_it_has_room_for(deaf: tuple[Side, Side]) -> None:
    ours, theirs = deaf
    asked = 5
    rows = [(64 * row, [(64 * row, 64)]) for row in range(asked)]
    accepted = [ours.post(Opcode.WRITE, theirs, rows, wr_id=0)]
    while accepted[-1] == asked and len(accepted) < 50:
        accepted.append(ours.post(Opcode.WRITE, theirs, rows, wr_id=sum(accepted)))
    total = sum(accepted)
    assert ours.pair.caps.max_send_wr <= total <= ours.pair.query()["max_send_wr"]
    assert accepted[-1] == total % asked
    assert ours.post(Opcode.WRITE, theirs, rows) == 0
    ours.pair.to_error()
    ends = ours.completions(total)  # unsignalled ones too: a failed request always completes
    assert set(ends["status"].tolist()) == {FLUSHED}
    assert ends["wr_id"].tolist() == list(range(total))


def test_an_error_flushes_sends_and_receives(deaf: tuple[Side, Side]) -> None:
    ours, theirs = deaf
    ours.pair.post_receive(70)
    ours.pair.post_receive(71)
    ours.post(Opcode.READ, theirs, [(0, [(0, 64)]), (64, [(64, 64)])], wr_id=80)
    ours.pair.to_error()
    ends = ours.completions(4)
    assert sorted(ends["wr_id"].tolist()) == [70, 71, 80, 81]
    assert ends["status"].tolist() == [FLUSHED] * 4
    assert not ends["received"].any()
    assert set(ends["qp_num"].tolist()) == {ours.pair.number}
    assert ours.pair.query()["qp_state"] == ERR


@pytest.mark.parametrize("opcode", [Opcode.WRITE, Opcode.READ])
@pytest.mark.parametrize("wrong", ["key", "bounds"])
def test_memory_that_the_peer_does_not_give_is_not_touched(
    sides: tuple[Side, Side], opcode: Opcode, wrong: str
) -> None:
    ours, theirs = sides
    mine, others = ours.data.copy(), theirs.data.copy()
    offset = 0 if wrong == "key" else theirs.data.size - 32
    rkey = theirs.region.rkey ^ (0xFF00 if wrong == "key" else 0)
    ours.post(opcode, theirs, [(offset, [(0, 64)]), (0, [(64, 64)])], rkey=rkey, wr_id=1)
    ends = ours.completions(2)
    assert ends["wr_id"].tolist() == [1, 2]
    assert ends["status"].tolist() == [REMOTE_ACCESS, FLUSHED]
    assert ours.pair.query()["qp_state"] == ERR
    assert (ours.data == mine).all()
    assert (theirs.data == others).all()


def test_a_peer_that_does_not_answer_is_given_up(verbs: Verbs) -> None:
    name = min(verbs.device_names())
    with Side(verbs, name) as ours, Side(verbs, name) as theirs:
        ours.connect(theirs, limits=LIMITS._replace(retry_count=1))
        ours.post(Opcode.WRITE, theirs, [(0, [(0, 64)])])
        assert ours.completions(1)["status"] == RETRIES_EXCEEDED


def test_nobody_holds_the_interpreter_while_waiting(verbs: Verbs) -> None:
    name = min(verbs.device_names())
    counted, stop = 0, threading.Event()

    def count() -> None:
        nonlocal counted
        while not stop.wait(0.01):
            counted += 1

    with Side(verbs, name) as ours, Side(verbs, name) as theirs:
        ours.connect(theirs, limits=LIMITS._replace(timeout=16, retry_count=2))  # 3 times 0.27 s
        counter = threading.Thread(target=count)
        counter.start()
        try:
            begin = time.monotonic()
            ours.post(Opcode.WRITE, theirs, [(0, [(0, 64)])])
            ours.completions(1)
            waited = time.monotonic() - begin
        finally:
            stop.set()
            counter.join()
    assert waited > 0.3
    assert counted > waited / 0.01 / 10


def test_draining_a_channel_without_events_returns_at_once(sides: tuple[Side, Side]) -> None:
    ours, _ = sides
    ours.queue.arm()
    begin = time.monotonic()
    ours.channel.drain()
    ours.channel.drain()
    assert time.monotonic() - begin < 1


def test_a_channel_is_readable_until_it_is_drained(sides: tuple[Side, Side]) -> None:
    ours, theirs = sides
    ours.queue.arm()
    assert not select.select([ours.channel], [], [], 0)[0]
    ours.post(Opcode.WRITE, theirs, [(0, [(0, 64)])])
    assert select.select([ours.channel], [], [], 30)[0]
    ours.channel.drain()
    assert not select.select([ours.channel], [], [], 0)[0]
    # not armed again: completions come and the channel is silent
    ours.post(Opcode.WRITE, theirs, [(0, [(0, 64)])])
    ours.completions(2)
    assert not select.select([ours.channel], [], [], 0)[0]


def test_poll_gives_no_more_than_there_is_room_for(sides: tuple[Side, Side]) -> None:
    ours, theirs = sides
    rows = [(64 * row, [(64 * row, 64)]) for row in range(10)]
    ours.post(Opcode.WRITE, theirs, rows, signal_every=1)
    ours.post(Opcode.WRITE, theirs, rows[:1], wr_id=10)
    found, seen = np.zeros(3, COMPLETION), []
    end = time.monotonic() + 30
    while len(seen) < 11 and time.monotonic() < end:
        count = ours.queue.poll(found)
        assert count <= 3
        seen += found["wr_id"][:count].tolist()
    assert seen == list(range(11))


def test_two_queues_of_a_channel_both_wake_it(verbs: Verbs) -> None:
    name = min(verbs.device_names())
    with Side(verbs, name) as ours, Side(verbs, name) as theirs:
        ours.connect(theirs)
        theirs.connect(ours)
        other = ours.device.completion_queue(16, ours.channel)
        pair = ours.device.queue_pair(other, other, CAPS)
        ours.queue.arm()
        other.arm()
        first, ours.pair = ours.pair, pair  # a second end at the same device, peerless
        try:
            ours.connect(theirs, limits=LIMITS._replace(timeout=8, retry_count=0))
            ours.post(Opcode.WRITE, theirs, [(0, [(0, 64)])], wr_id=2)
        finally:
            ours.pair = first
        ours.post(Opcode.WRITE, theirs, [(0, [(0, 64)])], wr_id=1)
        found = np.zeros(4, COMPLETION)
        seen: dict[int, int] = {}
        end = time.monotonic() + 30
        while len(seen) < 2 and time.monotonic() < end:
            select.select([ours.channel], [], [], 1)
            ours.channel.drain()
            for queue in (ours.queue, other):
                for row in found[: queue.poll(found)]:
                    seen[int(row["wr_id"])] = int(row["status"])
        assert seen == {1: SUCCESS, 2: RETRIES_EXCEEDED}
        pair.close()
        other.close()  # would wait for ever if an event of its were not acknowledged


def test_a_request_with_too_many_entries_is_refused(sides: tuple[Side, Side]) -> None:
    ours, theirs = sides
    entries = [(64 * entry, 64) for entry in range(ours.pair.caps.max_send_sge + 1)]
    with pytest.raises(VerbsError) as refused:
        ours.post(Opcode.WRITE, theirs, [(0, entries)])
    assert refused.value.errno
    assert str(ours.pair.number) in str(refused.value)
    # nothing of it was accepted, and the queue pair is as good as before
    assert ours.post(Opcode.WRITE, theirs, [(0, [(0, 64)])], wr_id=3) == 1
    assert ours.completions(1)["wr_id"] == 3


def test_a_queue_pair_that_was_never_connected_takes_no_requests(verbs: Verbs) -> None:
    name = min(verbs.device_names())
    with Side(verbs, name) as ours, Side(verbs, name) as theirs:
        with pytest.raises(VerbsError):
            ours.post(Opcode.WRITE, theirs, [(0, [(0, 64)])])
        with pytest.raises(VerbsError):
            ours.pair.post_imm(1, b"", theirs.address, theirs.region.rkey, wr_id=1)
