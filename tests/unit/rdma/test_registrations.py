"""Regions registered with NICs: in chunks, in parallel, all or nothing."""

from __future__ import annotations

import ctypes
import errno
import itertools
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mooncake_engine import InvalidTransfer, PathUnavailable, RdmaConfig
from mooncake_engine.errors import EngineClosed
from mooncake_engine.transport.rdma.chunks import cut
from mooncake_engine.transport.rdma.gpu import Gpu
from mooncake_engine.transport.rdma.registrations import Registrations
from mooncake_engine.transport.rdma.verbs.base import Access
from mooncake_engine.types import Region, uint64s
from verbs_stub import LIMITS, Provider, StubDevice

if TYPE_CHECKING:
    from collections.abc import Callable

KIB, MIB = 1 << 10, 1 << 20
BASE = 0x7000_0000_0000  # no memory is there: a stub pins nothing
RELAXED = Access.RELAXED_ORDERING


@pytest.fixture
def provider() -> Provider:
    return Provider()


def _registrations(provider: Provider, devices: int = 2, **settings: int) -> Registrations:
    config = RdmaConfig(**settings)  # type: ignore[arg-type]  # checked by each test's numbers
    gpu = Gpu(config, load=lambda name: ctypes.CDLL(f"missing-{name}"), sysfs=Path("/nonexistent"))
    return Registrations([StubDevice(provider, f"nic{i}") for i in range(devices)], config, gpu)


def _region(length: int, address: int = BASE, page_bytes: int = 0) -> Region:
    return Region(address, length, "cpu", None, page_bytes)


def test_a_region_is_registered_with_each_device_and_its_keys_are_in_their_order(
    provider: Provider,
) -> None:
    registrations = _registrations(provider)
    registrations.add(_region(MIB))
    assert [(row["device"], row["address"], row["length"]) for row in provider.of("register")] == [
        ("nic0", BASE, MIB),
        ("nic1", BASE, MIB),
    ]
    now = registrations.snapshot
    assert now.table.keys.tolist() == [[1], [2]]
    assert [row.keys for row in now.rkeys] == [(0x1000_0001, 0x1000_0002)]
    assert now.location_of(now.table.locate(uint64s([BASE + 5]))).tolist() == ["cpu"]


def test_peers_may_read_and_write_what_is_registered(provider: Provider) -> None:
    _registrations(provider, relaxed_ordering=0).add(_region(MIB))
    wanted = Access.LOCAL_WRITE | Access.REMOTE_READ | Access.REMOTE_WRITE
    assert {row["access"] for row in provider.of("register")} == {wanted}


@pytest.mark.parametrize(("setting", "host"), [(0, False), (1, True), (2, False)])
def test_relaxed_ordering_of_host_memory_follows_the_setting(
    provider: Provider, setting: int, host: bool
) -> None:
    _registrations(provider, relaxed_ordering=setting).add(_region(MIB))
    assert {bool(row["access"] & RELAXED) for row in provider.of("register")} == {host}


def test_a_region_beyond_the_limit_becomes_chunks_that_touch(provider: Provider) -> None:
    registrations = _registrations(provider, devices=1, max_mr_bytes=5 * MIB)
    registrations.add(_region(9 * MIB))
    now = registrations.snapshot
    assert (now.table.starts - np.uint64(BASE)).tolist() == [0, 4 * MIB, 8 * MIB]
    assert (now.table.ends - np.uint64(BASE)).tolist() == [4 * MIB, 8 * MIB, 9 * MIB]
    assert [row["length"] for row in provider.of("register")] == [4 * MIB, 4 * MIB, MIB]


def test_the_smallest_limit_of_the_devices_counts(provider: Provider) -> None:
    small = StubDevice(provider, "small", limits=LIMITS._replace(max_mr_size=2 * MIB))
    unknown = StubDevice(provider, "unknown", limits=LIMITS._replace(max_mr_size=0))
    config = RdmaConfig()
    Registrations([unknown, small, StubDevice(provider)], config, Gpu(config)).add(_region(4 * MIB))
    assert {row["length"] for row in provider.of("register")} == {2 * MIB}
    assert len(provider.of("register")) == 6


@given(
    length=st.integers(1, 64 * MIB),
    limit=st.integers(4 * KIB, 8 * MIB),
    page=st.integers(1000, 3 * MIB),
)
def test_no_page_straddles_two_chunks_and_no_chunk_is_too_long(
    length: int, limit: int, page: int
) -> None:
    if length > limit and page > limit:
        with pytest.raises(PathUnavailable, match="one page has"):
            cut(_region(length, page_bytes=page), limit)
        return
    chunks = cut(_region(length, page_bytes=page), limit)
    assert chunks[0][0] == BASE
    assert sum(size for _, size in chunks) == length
    for (start, size), (following, _) in itertools.pairwise(chunks):
        assert start + size == following
        assert (following - BASE) % page == 0
    assert max(size for _, size in chunks) <= limit


@given(length=st.integers(1, 64 * MIB), limit=st.integers(4 * KIB, 8 * MIB))
def test_chunks_of_a_region_without_pages_hold_whole_pages_of_the_host(
    length: int, limit: int
) -> None:
    chunks = cut(_region(length), limit)
    unit = 2 * MIB if limit >= 2 * MIB else 4 * KIB
    assert sum(size for _, size in chunks) == length
    assert all(size % unit == 0 and size <= limit for _, size in chunks[:-1])


@pytest.mark.parametrize("parallel", [0, 1])
@pytest.mark.parametrize("failing", range(6))
def test_a_failed_registration_undoes_the_others(
    provider: Provider, failing: int, parallel: int
) -> None:
    registrations = _registrations(provider, max_mr_bytes=2 * MIB, parallel_registration=parallel)
    provider.fail("register", errno.ENOSPC, after=failing)
    with pytest.raises(PathUnavailable):
        registrations.add(_region(6 * MIB))  # three chunks, two devices
    assert provider.open == 0
    assert len(registrations.snapshot.table) == 0
    assert registrations.snapshot.rkeys == ()
    registrations.add(_region(6 * MIB))  # and nothing is left in the way
    assert provider.open == 6


@pytest.mark.parametrize(
    ("code", "hints"),
    [
        (errno.ENOMEM, ["ENOMEM", "ulimit -l", "memlock=-1"]),
        (errno.EFAULT, ["EFAULT", "PROT_READ"]),
        (errno.ENOSPC, ["ENOSPC", "fewer and longer regions"]),
        (errno.EMFILE, ["EMFILE", "fewer and longer regions"]),
        (errno.EAGAIN, ["EAGAIN", "rdma.max"]),
        (errno.EOPNOTSUPP, ["ENOTSUP", "WITH_NVIDIA_PEERMEM"]),
        (errno.EIO, ["EIO", "dmesg"]),
    ],
)
def test_a_refused_registration_says_what_with_whom_why_and_what_to_try(
    provider: Provider, code: int, hints: list[str]
) -> None:
    provider.fail("register", code, after=1)
    with pytest.raises(PathUnavailable) as caught:
        _registrations(provider).add(_region(MIB))
    for part in (str(MIB), hex(BASE), "nic1", *hints):
        assert part in str(caught.value)


def test_removing_deregisters_and_forgets_the_keys(provider: Provider) -> None:
    registrations = _registrations(provider)
    registrations.add(_region(MIB))
    registrations.add(_region(MIB, BASE + 8 * MIB))
    registrations.remove(BASE)
    now = registrations.snapshot
    assert now.table.locate(uint64s([BASE, BASE + 8 * MIB])).tolist() == [-1, 0]
    assert [row.address for row in now.rkeys] == [BASE + 8 * MIB]
    assert provider.open == 2
    with pytest.raises(InvalidTransfer, match="nothing to deregister"):
        registrations.remove(BASE)


def test_each_change_makes_a_new_snapshot_and_leaves_the_old_one_as_it_was(
    provider: Provider,
) -> None:
    registrations = _registrations(provider)
    seen = [registrations.snapshot]
    registrations.add(_region(MIB))
    seen.append(registrations.snapshot)
    registrations.remove(BASE)
    seen.append(registrations.snapshot)
    assert [one.generation for one in seen] == [0, 1, 2]
    assert [len(one.table) for one in seen] == [0, 1, 0]


def test_a_device_that_does_not_let_go_is_named_and_the_others_let_go(provider: Provider) -> None:
    registrations = _registrations(provider)
    registrations.add(_region(MIB))
    provider.fail("close_region", errno.EBUSY)
    with pytest.raises(PathUnavailable, match=r"may still reach.*keep that memory"):
        registrations.remove(BASE)
    assert len(provider.of("close_region")) == 2
    assert len(registrations.snapshot.table) == 0


def test_closing_deregisters_everything_once_and_takes_no_more(provider: Provider) -> None:
    registrations = _registrations(provider)
    registrations.add(_region(MIB))
    registrations.add(_region(MIB, BASE + 8 * MIB))
    registrations.close()
    registrations.close()
    assert provider.open == 0
    registrations.remove(BASE)  # of a thread that was late
    assert len(provider.of("close_region")) == 4
    with pytest.raises(EngineClosed):
        registrations.add(_region(MIB))
    assert provider.open == 0


def test_the_same_region_again_is_refused_and_stays_registered(provider: Provider) -> None:
    registrations = _registrations(provider)
    registrations.add(_region(MIB))
    with pytest.raises(InvalidTransfer, match="registered already"):
        registrations.add(_region(MIB))
    assert provider.open == 2
    assert len(registrations.snapshot.table) == 1


def _in_background(call: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=call)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("settings", "length", "at_once"),
    [
        ({"parallel_registration": 1}, 6 * MIB, 6),
        ({"parallel_registration": 1, "max_concurrent_registrations": 3}, 6 * MIB, 3),
        ({"parallel_registration": 0}, 6 * MIB, 1),
        ({"parallel_registration": -1}, 6 * MIB, 1),
        ({"parallel_registration": -1, "max_mr_bytes": 1 << 30}, (1 << 30) + MIB, 4),
    ],
)
def test_registrations_run_at_once_as_the_setting_says(
    provider: Provider, settings: dict[str, int], length: int, at_once: int
) -> None:
    registrations = _registrations(provider, **{"max_mr_bytes": 2 * MIB} | settings)
    provider.hold()
    thread = _in_background(lambda: registrations.add(_region(length)))
    try:
        provider.wait_inside(at_once)
    finally:
        provider.release()
        thread.join(10)
    assert provider.most_at_once == at_once
    assert len(registrations.snapshot.table) == -(
        -length // (settings.get("max_mr_bytes", 2 * MIB))
    )


def test_closing_while_memory_is_registered_leaves_nothing_registered(provider: Provider) -> None:
    registrations = _registrations(provider)
    ended: list[BaseException] = []

    def add() -> None:
        try:
            registrations.add(_region(MIB))
        except EngineClosed as error:
            ended.append(error)

    provider.hold()
    thread = _in_background(add)
    provider.wait_inside(1)
    registrations.close()
    provider.release()
    thread.join(10)
    assert len(ended) == 1
    assert provider.open == 0


def test_memory_of_a_gpu_that_nothing_reaches_says_why(provider: Provider) -> None:
    with pytest.raises(PathUnavailable, match=r"cuda:0.*no usable NVIDIA GPU"):
        _registrations(provider).add(Region(BASE, MIB, "cuda:0"))
    assert provider.open == 0
