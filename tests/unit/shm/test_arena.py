"""Memory that the engine allocates: offered to readers, mapped by them, given back."""

from __future__ import annotations

import gc
import hashlib
import mmap
import os
import resource
import signal
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest
from mooncake_engine.errors import EngineClosed, EngineError, InvalidTransfer, LaneError
from mooncake_engine.iovec import address_of
from mooncake_engine.transport.shm.arena import Offer, proof
from mooncake_engine.transport.shm.arena_reader import ArenaReader
from mooncake_engine.transport.shm.transport import Endpoint
from mooncake_engine.types import Op, RegionRecord, Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from mooncake_engine.transport.shm import ShmTransport
    from shm_peers import Child, Reached

MIB = 1 << 20


def endpoint_of(transport: ShmTransport) -> Endpoint:
    return msgspec.msgpack.decode(transport.endpoint(), type=Endpoint)


def read_arenas_of(transport: ShmTransport) -> ArenaReader:
    endpoint = endpoint_of(transport)
    return ArenaReader("here", endpoint.arena, endpoint.nonce, 5)


def mapped_arenas() -> int:
    gc.collect()  # a traceback of an earlier test may hold an array
    return Path("/proc/self/maps").read_text().count("memfd:mooncake-arena")


def a_socket(name: str = "") -> socket.socket:
    """Connected to the abstract socket `name`, or not; silent for at most 5 s."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    made.settimeout(5)
    if name:
        made.connect(b"\0" + name.encode())
    return made


@pytest.mark.parametrize("rights", [{"step_down": True}, {"seccomp": True}])
def test_the_arena_is_exact_both_ways_where_ptrace_is_refused(
    child: Callable[..., Child], rights: dict[str, bool]
) -> None:
    size = 3 * MIB
    cuts = np.sort(np.random.default_rng(5).choice(size, 3000, replace=False))
    theirs, lengths = cuts[::2][::-1], (cuts[1::2] - cuts[::2])[::-1]
    target, reader = child("target", arena=size, hidden=True), child("reader", **rights)
    assert reader.do("connect", record=target.about["record"]) == "connected"
    remote = (target.about["arena"] + theirs).tolist()
    runs = {"remote": remote, "lengths": lengths.tolist()}

    want = target.content(size)
    packed = np.concatenate([want[a : a + n] for a, n in zip(theirs, lengths, strict=True)])
    got = reader.do("move", op="read", **runs)
    assert got == ["ok", hashlib.blake2b(packed.tobytes()).hexdigest()]

    assert reader.do("move", op="write", value=3, **runs)[0] == "ok"
    for a, n in zip(theirs, lengths, strict=True):
        want[a : a + n] = 3
    assert target.do("digest", which="arena") == hashlib.blake2b(want.tobytes()).hexdigest()

    status, said = reader.do("move", op="read", remote=[4096], lengths=[1])
    assert status == Status.REFUSED
    assert "TransferEngine.allocate" in said

    target.kill()
    assert reader.do("move", op="read", **runs)[0] == Status.PEER_GONE
    assert reader.do("close") is None


def test_a_big_run_is_exact_where_no_process_vm_call_is_permitted(
    child: Callable[..., Child],
) -> None:
    size = 5 * MIB
    target, reader = child("target", arena=size), child("reader", seccomp=True)
    reader.do("connect", record=target.about["record"])
    status, got = reader.do("move", op="read", remote=[target.about["arena"]], lengths=[size])
    assert [status, got] == ["ok", target.do("digest", which="arena")]


def test_a_dead_peer_is_gone_although_a_forked_child_holds_its_sockets(
    child: Callable[..., Child], reach: Callable[..., Reached]
) -> None:
    target = child("target", arena=MIB)
    reached = reach(target, "arena")
    heir = target.do("fork")
    target.kill()
    here = np.zeros(MIB, np.uint8)
    with pytest.raises(LaneError) as caught:
        reached.move(Op.READ, [address_of(here)], [target.about["arena"]], [MIB])
    os.kill(heir, signal.SIGKILL)
    assert caught.value.status is Status.PEER_GONE


def test_an_arena_allocated_after_connecting_is_reached_and_bounded(
    child: Callable[..., Child], reach: Callable[..., Reached]
) -> None:
    target = child("target", arena=MIB)
    reached = reach(target, "arena")
    here = np.zeros(5001, np.uint8)
    address = target.do("allocate", length=5000)
    reached.move(Op.READ, [address_of(here)], [address], [5000])
    assert (here[:5000] == 7).all()
    with pytest.raises(LaneError, match="outside the memory") as caught:
        reached.move(Op.READ, [address_of(here)], [address], [5001])
    assert caught.value.status is Status.REFUSED


def test_more_arenas_than_fit_one_message_are_all_offered(
    transport: Callable[..., ShmTransport],
) -> None:
    target = transport()
    arrays = [target.allocate(1 + n) for n in range(150)]
    reader = read_arenas_of(target)
    try:
        assert reader.covers(RegionRecord(address_of(a), a.size, "cpu") for a in arrays)
        assert not reader.covers([RegionRecord(address_of(arrays[0]), 2, "cpu")])
    finally:
        reader.close()


def test_two_arenas_never_touch_so_that_no_run_spans_both(
    transport: Callable[..., ShmTransport],
) -> None:
    target = transport()
    arrays = [target.allocate(mmap.PAGESIZE) for _ in range(20)]
    starts = sorted(address_of(array) for array in arrays)
    assert min(np.diff(starts)) > mmap.PAGESIZE


def test_strangers_at_the_arena_socket_get_nothing_and_harm_nobody(
    transport: Callable[..., ShmTransport],
) -> None:
    target = transport()
    target.allocate(MIB)
    endpoint = endpoint_of(target)
    for message in (b"\xc1 nonsense", msgspec.msgpack.encode([1, b"wrong proof"])):
        with a_socket(endpoint.arena) as stranger:
            stranger.send(message)
            assert stranger.recv(100) == b""
    with pytest.raises(LaneError, match="closed the connection"):
        ArenaReader("here", endpoint.arena, os.urandom(32), 5)
    read_arenas_of(target).close()


def test_a_silent_stranger_is_let_go_after_the_connect_timeout(
    transport: Callable[..., ShmTransport],
) -> None:
    target = transport(connect_timeout_s=0.1)
    target.allocate(1)
    with a_socket(endpoint_of(target).arena) as stranger:
        assert stranger.recv(100) == b""


def test_a_reader_that_takes_no_offers_loses_its_connection_and_stops_nobody(
    transport: Callable[..., ShmTransport],
) -> None:
    target = transport()
    target.allocate(1)
    reader = read_arenas_of(target)
    for _ in range(1500):  # the socket's queue is full after some hundred
        target.allocate(1)
    try:
        reader.learn()
        with pytest.raises(LaneError) as caught:
            reader.confirm(reader.poller())
        assert caught.value.status is Status.PEER_GONE
    finally:
        reader.close()


def test_an_arena_server_that_does_not_answer_is_given_up_in_time() -> None:
    name = f"mooncake-{os.urandom(8).hex()}"
    with a_socket() as mute:
        mute.bind(b"\0" + name.encode())
        mute.listen(1)
        start = time.monotonic()
        with pytest.raises(LaneError, match="did not answer"):
            ArenaReader("mute", name, os.urandom(32), 0.2)
        assert time.monotonic() - start < 5


def test_a_peer_whose_memory_file_could_shrink_is_not_mapped() -> None:
    name, nonce = f"mooncake-{os.urandom(8).hex()}", os.urandom(32)
    fd = os.memfd_create("unsealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 8192)

    def offer(listener: socket.socket) -> None:
        peer, _ = listener.accept()
        with peer:
            peer.recv(1000)
            said = Offer(proof(nonce, b"target"), ((4096, 8192),), more=False)
            socket.send_fds(peer, [msgspec.msgpack.encode(said)], [fd])

    with a_socket() as listener:
        listener.bind(b"\0" + name.encode())
        listener.listen(1)
        thread = threading.Thread(target=offer, args=(listener,))
        thread.start()
        with pytest.raises(LaneError, match="not sealed"):
            ArenaReader("crooked", name, nonce, 5)
        thread.join(5)
    os.close(fd)


def test_closing_unmaps_only_after_the_slice_in_flight(child: Callable[..., Child]) -> None:
    endpoint = child("target", arena=MIB).endpoint
    reader = ArenaReader("the target", endpoint.arena, endpoint.nonce, 5)
    with reader.use():
        reader.close()
        assert mapped_arenas() == 1
    assert mapped_arenas() == 0
    with pytest.raises(LaneError, match="closed"), reader.use():
        pass


def test_nothing_is_left_open_after_everything_is_closed(
    transport: Callable[..., ShmTransport],
) -> None:
    gc.collect()
    before = set(Path("/proc/self/fd").iterdir())
    target = transport()
    array = target.allocate(MIB)
    reader = read_arenas_of(target)
    reader.close()
    reader.close()
    target.close()
    target.close()
    array[:] = 1  # still the caller's
    del array
    assert set(Path("/proc/self/fd").iterdir()) == before
    assert mapped_arenas() == 0
    assert not [thread for thread in threading.enumerate() if thread.name == "shm-arena"]


def test_a_closed_transport_allocates_nothing(transport: Callable[..., ShmTransport]) -> None:
    target = transport()
    with pytest.raises(InvalidTransfer, match="positive"):
        target.allocate(0)
    target.close()
    with pytest.raises(EngineClosed):
        target.allocate(1)


def test_allocated_memory_is_zeroed_writable_and_starts_a_page(
    transport: Callable[..., ShmTransport],
) -> None:
    array = transport().allocate(10_000)
    assert address_of(array) % mmap.PAGESIZE == 0
    assert array.size == 10_000
    assert not array.any()
    array[-1] = 1


def test_more_memory_than_the_machine_has_is_a_clear_error(
    transport: Callable[..., ShmTransport],
) -> None:
    with pytest.raises(EngineError, match="cannot allocate 1152921504606846976 bytes"):
        transport().allocate(1 << 60)


def test_a_process_without_descriptors_is_told_so_and_nothing_is_left(
    transport: Callable[..., ShmTransport],
) -> None:
    target = transport()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(EngineError, match="ulimit -n"):
            target.allocate(1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert target.allocate(1).size == 1
