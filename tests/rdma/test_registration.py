"""Memory registered on real devices: what they take, what they refuse, and with which errno."""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
import rails
from cuda_stub import StubCuda
from harness.verbs_sides import Side
from mooncake_engine import PathUnavailable, RdmaConfig
from mooncake_engine.device import describe
from mooncake_engine.transport.rdma import memlock
from mooncake_engine.transport.rdma.gpu import Gpu
from mooncake_engine.transport.rdma.registrations import Registrations
from mooncake_engine.transport.rdma.verbs import load
from mooncake_engine.transport.rdma.verbs.base import Opcode, Work
from mooncake_engine.types import Region

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mooncake_engine.transport.rdma.keys import KeyRow
    from mooncake_engine.transport.rdma.verbs.base import Device
    from numpy.typing import NDArray

KIB, MIB = 1 << 10, 1 << 20
CHUNK = 64 * KIB
SUCCESS, REMOTE_ACCESS = 0, 10


def _memfd() -> NDArray[np.uint8]:
    descriptor = os.memfd_create("pages")
    try:
        os.ftruncate(descriptor, 3 * CHUNK)
        return np.frombuffer(mmap.mmap(descriptor, 3 * CHUNK), np.uint8)
    finally:
        os.close(descriptor)


def _anonymous() -> NDArray[np.uint8]:
    return np.frombuffer(mmap.mmap(-1, 3 * CHUNK), np.uint8)


def _heap() -> NDArray[np.uint8]:
    """From malloc, and not at the start of a page."""
    return np.zeros(3 * CHUNK + 100, np.uint8)[100:]


@pytest.fixture
def sides(devices: list[str]) -> Iterator[tuple[Side, Side]]:
    """Ours reads what theirs registers; both ends of a wire where there are two devices."""
    verbs = load("native")
    with Side(verbs, devices[0]) as ours, Side(verbs, devices[:2][-1], psn=9) as theirs:
        ours.connect(theirs)
        theirs.connect(ours)
        yield ours, theirs


@pytest.fixture
def opened(devices: list[str]) -> Iterator[list[Device]]:
    """All devices of this machine."""
    verbs = load("native")
    with contextlib.ExitStack() as stack:
        found = []
        for name in devices:
            device = verbs.open(name)
            stack.callback(device.close)
            found.append(device)
        yield found


@contextlib.contextmanager
def _registrations(devices: list[Device], **settings: int) -> Iterator[Registrations]:
    config = RdmaConfig(**settings)  # type: ignore[arg-type]  # checked by each test's numbers
    made = Registrations(devices, config, Gpu(config))
    with contextlib.closing(made):
        yield made


def _read(ours: Side, row: KeyRow, length: int) -> int:
    """READ from the start of a registered chunk into our memory; returns the status."""
    work = Work(
        np.array([row.address], np.uint64),
        np.array([0]),
        np.array([1]),
        np.array([ours.address], np.uint64),
        np.array([length], np.uint32),
    )
    lkeys, rkeys = (np.array([key], np.uint32) for key in (ours.region.lkey, row.keys[0]))
    ours.pair.post(Opcode.READ, work, slice(0, 1), lkeys, rkeys, wr_id=1, signal_every=1, inline=0)
    return int(ours.completions(1)["status"][0])


@pytest.mark.parametrize("memory", [_memfd, _anonymous, _heap])
def test_each_chunk_of_any_kind_of_memory_is_read_by_its_own_key(
    sides: tuple[Side, Side], memory: object
) -> None:
    ours, theirs = sides
    data = memory()  # type: ignore[operator]  # one of the three above
    data[:] = np.random.default_rng(2).integers(0, 256, data.size, np.uint8)
    with _registrations([theirs.device], max_mr_bytes=CHUNK) as registrations:
        region = describe(data, None, "cpu")
        registrations.add(region)
        rows = registrations.snapshot.rkeys
        assert len({row.keys for row in rows}) == 3
        for row in rows:
            assert _read(ours, row, CHUNK) == SUCCESS
            start = row.address - region.address
            assert np.array_equal(ours.data[:CHUNK], data[start : start + CHUNK])


def test_a_key_opens_its_chunk_only(sides: tuple[Side, Side]) -> None:
    ours, theirs = sides
    with _registrations([theirs.device], max_mr_bytes=CHUNK) as registrations:
        registrations.add(describe(data := _anonymous(), None, "cpu"))
        assert _read(ours, registrations.snapshot.rkeys[0], CHUNK + 1) == REMOTE_ACCESS
    assert not data.any()


def test_a_removed_region_is_reached_no_more(sides: tuple[Side, Side]) -> None:
    ours, theirs = sides
    with _registrations([theirs.device]) as registrations:
        region = describe(_anonymous(), None, "cpu")
        registrations.add(region)
        (row,) = registrations.snapshot.rkeys
        assert _read(ours, row, CHUNK) == SUCCESS
        registrations.remove(region.address)
        assert _read(ours, row, CHUNK) == REMOTE_ACCESS


@pytest.mark.parametrize("parallel", [0, 1])
def test_every_device_gets_every_chunk_and_gives_it_back(
    opened: list[Device], parallel: int
) -> None:
    before = memlock.read().pinned
    data = np.frombuffer(mmap.mmap(-1, 2 * MIB), np.uint8)
    settings = {"max_mr_bytes": 256 * KIB, "parallel_registration": parallel}
    with _registrations(opened, **settings) as registrations:
        registrations.add(describe(data, None, "cpu"))
        assert registrations.snapshot.table.keys.shape == (len(opened), 8)
        # The kernel counts a page once for each device: what the limit is compared with.
        assert memlock.read().pinned - before == 2 * MIB * len(opened)
    assert memlock.read().pinned == before


@pytest.mark.parametrize("relaxed", [0, 1, 2])
def test_relaxed_ordering_is_taken_by_a_device_that_knows_nothing_of_it(
    opened: list[Device], relaxed: int
) -> None:
    with _registrations(opened[:1], relaxed_ordering=relaxed) as registrations:
        registrations.add(describe(_anonymous(), None, "cpu"))


def test_read_only_memory_is_refused_with_the_reason(opened: list[Device], tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(CHUNK))
    with file.open("rb") as source, _registrations(opened) as registrations:
        data = np.frombuffer(mmap.mmap(source.fileno(), 0, prot=mmap.PROT_READ), np.uint8)
        with pytest.raises(PathUnavailable, match=r"EFAULT.*PROT_READ") as caught:
            registrations.add(describe(data, None, "cpu"))
        assert opened[0].name in str(caught.value)
        assert registrations.snapshot.rkeys == ()


def test_memory_that_is_not_mapped_is_refused_and_what_was_pinned_is_let_go(
    opened: list[Device],
) -> None:
    before = memlock.read().pinned
    pages = mmap.mmap(-1, 2 * MIB)
    address = int(np.frombuffer(pages, np.uint8).ctypes.data)
    pages.close()
    with _registrations(opened, max_mr_bytes=256 * KIB) as registrations:
        hole = Region(address, 2 * MIB, "cpu")
        with pytest.raises(PathUnavailable, match="EFAULT"):
            registrations.add(hole)
        assert memlock.read().pinned == before


def test_a_device_without_dmabuf_refuses_memory_of_a_gpu_and_says_what_to_try(
    opened: list[Device], tmp_path: Path
) -> None:
    if not rails.in_guest():
        pytest.skip("a NIC of this machine may take a DMA-BUF, and the stub's is none")
    cuda, address = StubCuda(), 1 << 40
    cuda.allocations = [(address, 2 * MIB)]
    config = RdmaConfig()
    registrations = Registrations(opened, config, Gpu(config, load=cuda.load, sysfs=tmp_path))
    with contextlib.closing(registrations):
        with pytest.raises(PathUnavailable, match=r"ENOTSUP.*WITH_NVIDIA_PEERMEM=1"):
            registrations.add(Region(address, MIB, "cuda:0"))
        assert registrations.snapshot.rkeys == ()


def _child(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


_START = """
import contextlib, errno, mmap, os, resource, sys
import numpy as np
from mooncake_engine import PathUnavailable, RdmaConfig
from mooncake_engine.device import describe
from mooncake_engine.transport.rdma import memlock
from mooncake_engine.transport.rdma.gpu import Gpu
from mooncake_engine.transport.rdma.registrations import Registrations
from mooncake_engine.transport.rdma.verbs import load, native
from mooncake_engine.transport.rdma.verbs.base import Access, VerbsError

def region(length):
    return describe(np.frombuffer(mmap.mmap(-1, length), np.uint8), None, "cpu")

def registrations(devices, **settings):
    config = RdmaConfig(**settings)
    return Registrations(devices, config, Gpu(config))
"""

_LIMITED = f"""{_START}
resource.setrlimit(resource.RLIMIT_MEMLOCK, (4 << 20, 4 << 20))
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)  # no CAP_IPC_LOCK
verbs = load("native")
devices = [verbs.open(name) for name in sys.argv[1:]]
held = region(3 << 20)
first = devices[0].register(held.address, held.length, Access.LOCAL_WRITE)
try:
    devices[-1].register(held.address, held.length, Access.LOCAL_WRITE)
    print("the kernel took too much")
except VerbsError as error:
    print(errno.errorcode[error.errno], memlock.read())
both, one = registrations(devices), registrations(devices[:1])
try:
    both.add(region(1 << 20))  # 3 + 1 + 1 MiB
    print("we took too much")
except PathUnavailable as refusal:
    print(refusal)
last = region(1 << 20)
one.add(last)  # 3 + 1 MiB are just allowed, by the kernel as by us
print(memlock.read())
"""


def test_a_low_limit_of_locked_memory_is_explained_before_the_kernel_says_enomem(
    devices: list[str],
) -> None:
    kernel, ours, after = _child(_LIMITED, devices[0], devices[:2][-1]).splitlines()
    assert kernel == f"ENOMEM {memlock.Limit(4 * MIB, 3 * MIB)}"
    for part in (str(2 * MIB), str(3 * MIB), str(4 * MIB), *devices[:2], "ulimit -l"):
        assert part in ours
    assert after == str(memlock.Limit(4 * MIB, 4 * MIB))


_EXHAUSTED = f"""{_START}
with open(f"{{sys.argv[1]}}/cgroup.procs", "w") as group:
    group.write(str(os.getpid()))
device = load("native").open(sys.argv[2])
mine = registrations([device], max_mr_bytes=64 << 10)
five, four, two = region(5 << 16), region(4 << 16), region(2 << 16)
mine.add(five)  # the domain and five registrations, of eight objects
try:
    mine.add(four)
    print("not exhausted")
except PathUnavailable as refusal:
    print(refusal)
mine.add(two)  # what had been made of `four` is free again
print(len(mine.snapshot.rkeys))
mine.close()
mine = registrations([device], max_mr_bytes=64 << 10)
mine.add(four)
print(len(mine.snapshot.rkeys))
"""


@pytest.fixture
def group(devices: list[str], tmp_path: Path) -> Iterator[Path]:
    """A control group that may have eight objects of the first device."""
    if not rails.in_guest():
        pytest.skip("control groups are made in the guest only, never on a machine of somebody's")
    root = tmp_path / "groups"
    root.mkdir()
    subprocess.run(["mount", "-t", "cgroup2", "none", str(root)], check=True)
    try:
        (root / "cgroup.subtree_control").write_text("+rdma")
        group = root / "few"
        group.mkdir()
        (group / "rdma.max").write_text(f"{devices[0]} hca_object=8")
        yield group
        group.rmdir()
    finally:
        subprocess.run(["umount", str(root)], check=True)


def test_a_device_that_is_out_of_registrations_undoes_the_region_and_serves_on(
    devices: list[str], group: Path
) -> None:
    refusal, after, anew = _child(_EXHAUSTED, str(group), devices[0]).splitlines()
    for part in (str(4 * CHUNK), devices[0], "EAGAIN", "rdma.max"):
        assert part in refusal
    assert (after, anew) == ("7", "4")
