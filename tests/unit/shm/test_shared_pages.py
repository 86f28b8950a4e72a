"""Registered memory that becomes a memfd's, so that peers map it: the bytes, and the way back."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import mmap
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest
from engines import config
from mooncake_engine.config import ShmConfig
from mooncake_engine.engine import TransferEngine
from mooncake_engine.errors import EngineError
from mooncake_engine.iovec import address_of, libc
from mooncake_engine.transport.shm.arena import available_bytes
from mooncake_engine.transport.shm.lane import MappedFirst
from mooncake_engine.transport.shm.shared_pages import SharedPages
from mooncake_engine.types import Op, Slice, uint64s
from native_loops import needs_native

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray
    from shm_peers import Child

PAGE = mmap.PAGESIZE
BIG = 2 << 20  # more than a lane of small batches moves
LATE = 1e9  # a deadline that does not come


def plain(nbytes: int, seed: int = 1) -> NDArray[np.uint8]:
    """Random bytes in pages of this process alone, from a page's start on."""
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = np.frombuffer(pages, np.uint8)
    memory[:] = noise(nbytes, seed)
    return memory


def noise(nbytes: int, seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def memfds_mapped() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:mooncake-arena")


def sharing(protocol: str = "shm") -> TransferEngine:
    return TransferEngine(config(protocol, shm=ShmConfig(share_registered=True)))


def one(op: Op, here: int, there: int, nbytes: int) -> Slice:
    return Slice(op, uint64s([here]), uint64s([there]), uint64s([nbytes]), nbytes, b"")


@pytest.fixture
def far() -> Iterator[TransferEngine]:
    with sharing() as engine:
        yield engine


@pytest.fixture
def near() -> Iterator[TransferEngine]:
    with TransferEngine(config("shm")) as engine:
        yield engine


@pytest.fixture
def lane(far: TransferEngine, near: TransferEngine) -> Iterator[Callable[[], MappedFirst]]:
    """Opens a lane for large batches from `near` to what `far` has registered."""
    needs_native()
    with contextlib.ExitStack() as closing:

        def opened() -> MappedFirst:
            link = near.transports["shm"].connect(far.record())
            closing.callback(link.close)
            assert link.bulk
            made = link.bulk.open_lane()
            closing.callback(made.close)
            assert isinstance(made, MappedFirst)
            return made

        yield opened


@pytest.mark.parametrize(("before", "behind"), [(0, 0), (16, 0), (0, 24), (16, 24), (4095, 4095)])
def test_bytes_stay_where_they_are_and_come_back_to_plain_pages(before: int, behind: int) -> None:
    memory = plain(70 * PAGE)
    want = memory.copy()
    pages = SharedPages(address_of(memory) + before, memory.size - before - behind)
    assert (pages.address - address_of(memory), pages.length) == (
        -(-before // PAGE) * PAGE,
        memory.size - (-(-before // PAGE) + -(-behind // PAGE)) * PAGE,
    )
    assert memfds_mapped() == 1
    assert np.array_equal(memory, want)
    memory[:] = want = noise(memory.size, 2)
    pages.close()
    pages.close()
    assert memfds_mapped() == 0
    assert np.array_equal(memory, want)


def test_many_steps_keep_every_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mooncake_engine.transport.shm.shared_pages.STEP", 3 * PAGE)
    memory = plain(20 * PAGE)
    want = memory.copy()
    pages = SharedPages(address_of(memory), memory.size)
    assert np.array_equal(memory, want)
    pages.close()
    assert np.array_equal(memory, want)


def test_memory_that_runs_short_on_the_way_leaves_plain_pages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = "mooncake_engine.transport.shm.shared_pages"
    steps = iter([available_bytes(), available_bytes(), PAGE - 1])
    monkeypatch.setattr(f"{module}.STEP", 3 * PAGE)
    monkeypatch.setattr(f"{module}.available_bytes", lambda: next(steps))
    memory = plain(20 * PAGE)
    want = memory.copy()
    descriptors = set(Path("/proc/self/fd").iterdir())
    with pytest.raises(EngineError, match="4095 bytes of memory left"):
        SharedPages(address_of(memory), memory.size)
    assert np.array_equal(memory, want)
    assert memfds_mapped() == 0
    assert set(Path("/proc/self/fd").iterdir()) == descriptors


def test_memory_freed_too_soon_is_not_taken_from_its_next_owner() -> None:
    freed = plain(8 * PAGE)
    address = address_of(freed)
    pages = SharedPages(address, freed.size)
    where = ctypes.c_void_p(address)
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10  # MAP_FIXED: its next owner
    assert libc.mmap(where, 8 * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, private, -1, 0) == address
    freed[:] = 5
    pages.close()
    assert (freed == 5).all()


@pytest.mark.parametrize("op", list(Op))
@pytest.mark.parametrize("offset", [0, 16])
def test_a_large_batch_is_exact_wherever_its_runs_lie(
    op: Op, offset: int, far: TransferEngine, near: TransferEngine
) -> None:
    needs_native()
    theirs = plain(2 * BIG, 3)[offset:]
    ours = plain(2 * BIG, 4)[offset:]
    for engine, memory in ((far, theirs), (near, ours)):
        engine.register_memory(memory)
    cuts = np.sort(np.random.default_rng(5).choice(theirs.size, 2000, replace=False))
    there, lengths = cuts[::2][::-1], (cuts[1::2] - cuts[::2])[::-1]
    here = np.cumsum(lengths) - lengths
    want_ours, want_theirs = ours.copy(), theirs.copy()
    for a, b, n in zip(here, there, lengths, strict=True):
        if op is Op.READ:
            want_ours[a : a + n] = want_theirs[b : b + n]
        else:
            want_theirs[b : b + n] = want_ours[a : a + n]
    segment = near.open_segment(far.name)
    rows = address_of(ours) + here, address_of(theirs) + there, lengths
    assert near.transfer(op, segment, *rows).ok
    assert np.array_equal(ours, want_ours)
    assert np.array_equal(theirs, want_theirs)


def test_large_slices_go_over_the_mapping_and_by_pid_where_it_does_not_reach(
    far: TransferEngine, lane: Callable[[], MappedFirst], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, ours = plain(4 * PAGE)[16:], np.zeros(4 * PAGE, np.uint8)
    far.register_memory(theirs)
    opened = lane()
    by_pid: list[int] = []
    move = opened._by_pid.move
    monkeypatch.setattr(
        opened._by_pid, "move", lambda piece, deadline: (by_pid.append(1), move(piece, deadline))
    )
    start = address_of(theirs)
    opened.move(one(Op.READ, address_of(ours), start + PAGE, 2 * PAGE), LATE)
    assert (by_pid, ours[: 2 * PAGE].tobytes()) == ([], theirs[PAGE : 3 * PAGE].tobytes())
    opened.move(one(Op.READ, address_of(ours), start, 2 * PAGE), LATE)  # begins before a whole page
    assert (by_pid, ours[: 2 * PAGE].tobytes()) == ([1], theirs[: 2 * PAGE].tobytes())


@pytest.mark.parametrize("op", list(Op))
@pytest.mark.parametrize("shared_again", [True, False])
def test_an_address_registered_anew_is_never_served_from_what_it_was(
    op: Op, shared_again: bool, far: TransferEngine, lane: Callable[[], MappedFirst]
) -> None:
    theirs, ours = plain(BIG), np.zeros(BIG, np.uint8)
    region = far.register_memory(theirs)
    opened = lane()
    piece = one(op, address_of(ours), region.address, BIG)
    opened.move(one(Op.READ, address_of(ours), region.address, BIG), LATE)
    for seed in (7, 8):
        far.unregister_memory(region)
        theirs[:] = noise(BIG, seed)
        if shared_again:
            region = far.register_memory(theirs)
        ours[:] = noise(BIG, 9)
        opened.move(piece, LATE)  # plain memory is reached by pid, registered or not
        assert np.array_equal(ours, theirs)
        if not shared_again:
            region = far.register_memory(theirs)


@pytest.mark.parametrize("op", list(Op))
def test_what_another_lane_learned_in_the_meantime_is_not_missed(
    op: Op,
    far: TransferEngine,
    lane: Callable[[], MappedFirst],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    theirs, ours = plain(BIG), noise(BIG, 3)
    region = far.register_memory(theirs)
    opened = lane()
    reader = opened._mapped._way._reader  # type: ignore[attr-defined]  # it is a ByMapping
    locate = reader.locate

    def late(*where: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Between the look and the copy the region is replaced, and another lane is told of it."""
        monkeypatch.setattr(reader, "locate", locate)
        found: NDArray[np.uint64] = locate(*where)
        far.unregister_memory(region)
        theirs[:] = noise(BIG, 7)
        far.register_memory(theirs)
        reader.learn()
        return found

    monkeypatch.setattr(reader, "locate", late)
    opened.move(one(op, address_of(ours), region.address, BIG), LATE)
    assert np.array_equal(ours, theirs)
    assert np.array_equal(theirs, noise(BIG, 7 if op is Op.READ else 3))


def test_a_peer_unmaps_what_was_withdrawn(
    far: TransferEngine, lane: Callable[[], MappedFirst]
) -> None:
    theirs, ours = plain(BIG), np.zeros(BIG, np.uint8)
    region = far.register_memory(theirs)
    opened = lane()
    opened.move(one(Op.READ, address_of(ours), region.address, BIG), LATE)
    assert memfds_mapped() == 2
    far.unregister_memory(region)
    opened.move(one(Op.READ, address_of(ours), region.address, BIG), LATE)
    assert memfds_mapped() == 0


def test_a_reader_that_is_let_go_goes_on_by_pid(
    far: TransferEngine, lane: Callable[[], MappedFirst]
) -> None:
    theirs, ours = plain(BIG), np.zeros(BIG, np.uint8)
    region = far.register_memory(theirs)
    opened = lane()
    far.transports["shm"]._server.close()  # type: ignore[attr-defined]  # as for one that takes no offers
    for _ in range(2):
        ours[:] = 0
        opened.move(one(Op.READ, address_of(ours), region.address, BIG), LATE)
        assert np.array_equal(ours, theirs)


def test_memory_of_others_too_stays_as_it_is_and_is_reached_by_pid(
    far: TransferEngine, near: TransferEngine, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = np.frombuffer(mmap.mmap(-1, BIG), np.uint8)  # MAP_SHARED
    theirs[:] = noise(BIG, 2)
    with caplog.at_level(logging.WARNING):
        region = far.register_memory(theirs)
    assert "not plain memory of this process alone (rw-s /dev/zero" in caplog.text
    ours = plain(BIG)
    near.register_memory(ours)
    segment = near.open_segment(far.name)
    assert near.transfer("read", segment, [(address_of(ours), region.address, BIG)]).ok
    assert np.array_equal(ours, theirs)


def test_allocated_memory_is_shared_already(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with sharing() as engine:
        with caplog.at_level(logging.WARNING):
            memory = engine.allocate(BIG)
        assert (memfds_mapped(), caplog.text) == (1, "")
        engine.unregister_memory(address_of(memory))
        assert memfds_mapped() == 1  # the array's, as without sharing


def test_closing_the_engine_gives_the_pages_back() -> None:
    memory = plain(BIG)
    with sharing() as engine:
        engine.register_memory(memory)
        assert memfds_mapped() == 1
    assert memfds_mapped() == 0
    assert np.array_equal(memory, noise(BIG, 1))


def test_pages_are_exchanged_before_another_transport_may_pin_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with sharing("auto") as engine:
        memory = plain(BIG)
        seen: list[int] = []
        engine.transports = dict(reversed(engine.transports.items()))
        monkeypatch.setattr(
            engine.transports["tcp"], "register", lambda _: seen.append(memfds_mapped())
        )
        engine.register_memory(memory)
        assert seen == [1]


def read_without_process_vm(
    child: Callable[..., Child], engine: TransferEngine, memory: NDArray[np.uint8]
) -> str:
    """The path by which another process, to whom those calls are forbidden, got the right bytes."""
    reader = child("engine")
    record = msgspec.msgpack.encode(engine.record()).hex()
    got = reader.do("read", record=record, remote=address_of(memory), length=memory.size)
    reader.do("close")
    assert got[1:] == ["ok", hashlib.blake2b(memory.tobytes()).hexdigest()]
    return str(got[0])


def test_registered_memory_is_read_where_no_process_vm_call_is_permitted(
    child: Callable[..., Child],
) -> None:
    with sharing("auto") as engine:
        memory = plain(BIG)
        engine.register_memory(memory)
        assert read_without_process_vm(child, engine, memory) == "shm"


def test_regions_that_touch_go_over_tcp_where_no_process_vm_call_is_permitted(
    child: Callable[..., Child],
) -> None:
    """A run may span both, which the reader has at unrelated addresses."""
    with sharing("auto") as engine:
        memory = plain(BIG)
        for half in (memory[: BIG // 2], memory[BIG // 2 :]):
            engine.register_memory(half)
        assert read_without_process_vm(child, engine, memory) == "tcp"
