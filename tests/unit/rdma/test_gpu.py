"""How memory of GPUs is reached, against a stub of the CUDA driver and of the NICs.

What needs a GPU or a NIC is not shown here: that a real driver exports the memory of a torch
tensor, and that a NIC's driver takes it.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
from typing import TYPE_CHECKING

import pytest
from cuda_stub import DMA_BUF, FLUSH_OPTIONS, INVALID_VALUE, NOT_SUPPORTED, ORDERING, StubCuda
from mooncake_engine import PathUnavailable, RdmaConfig
from mooncake_engine.errors import LaneError
from mooncake_engine.transport.rdma.gpu import Gpu, Way, ordinal
from mooncake_engine.transport.rdma.registrations import Registrations
from mooncake_engine.transport.rdma.verbs.base import Access, MemoryRegion
from mooncake_engine.types import Region, Status
from typing_extensions import override
from verbs_stub import Provider, StubDevice

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20
BLOCK = 0x7F00_0000_0000  # what torch's allocator got from the driver: 2 MiB or more, so aligned
PAGE = mmap.PAGESIZE


@pytest.fixture
def cuda() -> StubCuda:
    stub = StubCuda(gpus=2)
    stub.allocations = [(BLOCK, 20 * MIB)]
    return stub


@pytest.fixture
def provider() -> Provider:
    return Provider()


def _gpu(cuda: StubCuda, sysfs: Path, *modules: str, peermem: bool = False) -> Gpu:
    for module in modules:
        (sysfs / "module" / module).mkdir(parents=True)
    return Gpu(RdmaConfig(nvidia_peermem=peermem), load=cuda.load, sysfs=sysfs)


def test_dmabuf_is_taken_where_the_driver_exports_it(cuda: StubCuda, tmp_path: Path) -> None:
    gpu = _gpu(cuda, tmp_path, "nvidia_peermem")
    assert gpu.way is Way.DMABUF
    assert "exports it" in gpu.reason


def test_one_gpu_without_dmabuf_is_enough_to_take_peermem(cuda: StubCuda, tmp_path: Path) -> None:
    cuda.attributes[1, DMA_BUF] = 0
    assert _gpu(cuda, tmp_path, "nvidia_peermem").way is Way.PEERMEM


def test_a_driver_that_does_not_know_dmabuf_takes_the_old_module(
    cuda: StubCuda, tmp_path: Path
) -> None:
    del cuda.attributes[0, DMA_BUF]  # CUDA_ERROR_INVALID_VALUE
    gpu = _gpu(cuda, tmp_path, "nv_peer_mem")
    assert gpu.way is Way.PEERMEM
    assert "nv_peer_mem is loaded" in gpu.reason


def test_peermem_that_is_asked_for_is_taken_or_refused(cuda: StubCuda, tmp_path: Path) -> None:
    gpu = _gpu(cuda, tmp_path, peermem=True)
    assert gpu.way is Way.NONE
    assert "modprobe nvidia-peermem" in gpu.reason
    gpu = _gpu(cuda, tmp_path, "nvidia_peermem", peermem=True)
    assert gpu.way is Way.PEERMEM
    assert "WITH_NVIDIA_PEERMEM=1" in gpu.reason


def test_without_either_way_it_says_what_to_install(cuda: StubCuda, tmp_path: Path) -> None:
    cuda.attributes[0, DMA_BUF] = 0
    gpu = _gpu(cuda, tmp_path)
    assert gpu.way is Way.NONE
    assert "open kernel modules" in gpu.reason
    assert "modprobe nvidia-peermem" in gpu.reason


def test_without_a_driver_or_a_gpu_there_is_no_way_and_no_error(tmp_path: Path) -> None:
    missing = Gpu(RdmaConfig(), load=lambda name: ctypes.CDLL(f"missing-{name}"), sysfs=tmp_path)
    assert missing.way is Way.NONE
    assert "cannot be loaded" in missing.reason
    assert missing.pci_addresses() == ()
    none = _gpu(StubCuda(gpus=0), tmp_path)
    assert none.way is Way.NONE
    assert "CUDA_ERROR_NO_DEVICE" in none.reason


def test_the_choice_is_made_at_the_first_question_and_logged_once(
    cuda: StubCuda, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    gpu = _gpu(cuda, tmp_path)
    assert cuda.loads == 0
    for _ in range(2):
        assert gpu.way is Way.DMABUF
        assert gpu.reason
    assert cuda.loads == 1
    assert len([line for line in caplog.messages if "DMA-BUF" in line]) == 1


class _Importing(StubDevice):
    """A NIC that takes a DMA-BUF; the descriptor must be open then."""

    @override
    def register_dmabuf(
        self, fd: int, offset: int, length: int, address: int, access: Access
    ) -> MemoryRegion:
        assert os.fstat(fd)
        return super().register_dmabuf(fd, offset, length, address, access)


@pytest.mark.parametrize(
    ("address", "length", "start", "span"),
    [
        (BLOCK, 2 * MIB, BLOCK, 2 * MIB),
        (BLOCK + 512, 3000, BLOCK, PAGE),  # torch hands out multiples of 512 bytes
        (BLOCK + 2 * PAGE - 512, 1024, BLOCK + PAGE, 2 * PAGE),
        (BLOCK + 20 * MIB - 512, 512, BLOCK + 20 * MIB - PAGE, PAGE),
    ],
)
def test_a_part_of_a_block_is_exported_in_whole_pages_and_registered_from_its_offset(
    cuda: StubCuda,
    provider: Provider,
    tmp_path: Path,
    address: int,
    length: int,
    start: int,
    span: int,
) -> None:
    device = _Importing(provider, "nic0")
    made = _gpu(cuda, tmp_path).register(device, address, length, Access.LOCAL_WRITE, "cuda:1")
    ((gpu, exported, exported_length, fd),) = cuda.exports
    assert (gpu, exported, exported_length) == (1, start, span)
    assert provider.of("register_dmabuf") == [
        {
            "device": "nic0",
            "fd": fd,
            "offset": address - start,
            "length": length,
            "address": address,
            "access": Access.LOCAL_WRITE,
        }
    ]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    made.close()
    assert cuda.retained == 0
    assert provider.of("register") == []


def test_a_nic_that_refuses_a_dmabuf_leaves_no_descriptor_and_says_what_to_try(
    cuda: StubCuda, provider: Provider, tmp_path: Path
) -> None:
    provider.fail("register_dmabuf", errno.EOPNOTSUPP)
    registrations = Registrations(
        [StubDevice(provider, "nic0")], RdmaConfig(), _gpu(cuda, tmp_path)
    )
    with pytest.raises(PathUnavailable, match=r"cuda:0.*nic0.*WITH_NVIDIA_PEERMEM=1"):
        registrations.add(Region(BLOCK, MIB, "cuda:0"))
    assert provider.open == 0


def test_memory_that_spans_mappings_is_refused_with_the_allocators_setting(
    cuda: StubCuda, provider: Provider, tmp_path: Path
) -> None:
    cuda.allocations = [(BLOCK, 2 * MIB), (BLOCK + 2 * MIB, 2 * MIB)]  # expandable segments
    with pytest.raises(PathUnavailable, match=r"several mappings.*expandable_segments:False"):
        _gpu(cuda, tmp_path).register(
            StubDevice(provider), BLOCK + MIB, 2 * MIB, Access.LOCAL_WRITE, "cuda:0"
        )


def test_an_address_that_is_not_the_gpus_is_called_that(
    cuda: StubCuda, provider: Provider, tmp_path: Path
) -> None:
    with pytest.raises(PathUnavailable, match=r"INVALID_VALUE.*no memory of that GPU"):
        _gpu(cuda, tmp_path).register(StubDevice(provider), PAGE, 8, Access.LOCAL_WRITE, "cuda:0")


def test_a_driver_that_cannot_export_after_all_is_named(
    cuda: StubCuda, provider: Provider, tmp_path: Path
) -> None:
    cuda.result = NOT_SUPPORTED
    with pytest.raises(PathUnavailable, match=r"failed with 801.*nvidia-peermem"):
        _gpu(cuda, tmp_path).register(StubDevice(provider), BLOCK, 8, Access.LOCAL_WRITE, "cuda:0")


def test_peermem_registers_addresses_of_the_gpu_plainly(
    cuda: StubCuda, provider: Provider, tmp_path: Path
) -> None:
    gpu = _gpu(cuda, tmp_path, "nvidia_peermem", peermem=True)
    Registrations([StubDevice(provider)], RdmaConfig(), gpu).add(Region(BLOCK, MIB, "cuda:0"))
    assert [row["address"] for row in provider.of("register")] == [BLOCK]
    assert cuda.exports == []


@pytest.mark.parametrize(("setting", "relaxed"), [(0, False), (1, True), (2, True)])
def test_relaxed_ordering_of_a_gpus_memory_follows_the_setting(
    cuda: StubCuda, provider: Provider, tmp_path: Path, setting: int, relaxed: bool
) -> None:
    config = RdmaConfig(relaxed_ordering=setting)  # type: ignore[arg-type]  # 0, 1 or 2
    registrations = Registrations([StubDevice(provider)], config, _gpu(cuda, tmp_path))
    registrations.add(Region(BLOCK, MIB, "cuda:0"))
    (row,) = provider.of("register_dmabuf")
    assert bool(row["access"] & Access.RELAXED_ORDERING) is relaxed


def test_a_gpus_memory_is_not_held_against_the_limit_of_locked_memory(
    cuda: StubCuda, provider: Provider, tmp_path: Path
) -> None:
    cuda.allocations = [(BLOCK, 1 << 50)]
    registrations = Registrations([StubDevice(provider)], RdmaConfig(), _gpu(cuda, tmp_path))
    registrations.add(Region(BLOCK, 1 << 45, "cuda:0"))
    assert len(registrations.snapshot.table) == 32  # of 1 TiB each


def test_writes_are_flushed_on_the_gpu_that_does_not_order_them(
    cuda: StubCuda, tmp_path: Path
) -> None:
    cuda.attributes[1, ORDERING] = 0
    gpu = _gpu(cuda, tmp_path)
    gpu.flush_writes(0)
    assert cuda.flushes == []
    gpu.flush_writes(1)
    assert cuda.flushes == [(1, 0, 100)]
    assert cuda.retained == 0


def test_a_flush_that_fails_fails_the_slice(cuda: StubCuda, tmp_path: Path) -> None:
    cuda.attributes[0, ORDERING] = 0
    gpu = _gpu(cuda, tmp_path)
    cuda.result = INVALID_VALUE
    with pytest.raises(LaneError, match="cuda:0 visible") as caught:
        gpu.flush_writes(0)
    assert caught.value.status is Status.FAILED


def test_a_gpu_that_can_neither_order_nor_flush_is_not_reached(
    cuda: StubCuda, tmp_path: Path
) -> None:
    cuda.attributes[1, ORDERING] = 0
    cuda.attributes[1, FLUSH_OPTIONS] = 2  # in streams only
    gpu = _gpu(cuda, tmp_path)
    assert gpu.way is Way.NONE
    assert "cuda:1 can neither order nor flush" in gpu.reason


def test_an_old_driver_without_the_newer_calls_still_serves_by_peermem(tmp_path: Path) -> None:
    old = StubCuda(without=("cuMemGetHandleForAddressRange", "cuFlushGPUDirectRDMAWrites"))
    old.attributes = {(0, ORDERING): 100}
    assert _gpu(old, tmp_path, "nv_peer_mem").way is Way.PEERMEM


def test_gpus_are_known_by_their_pci_addresses(cuda: StubCuda, tmp_path: Path) -> None:
    assert _gpu(cuda, tmp_path).pci_addresses() == ("0000:3b:00.0", "0000:3c:00.0")


def test_the_number_of_a_gpu_comes_from_its_location() -> None:
    assert [ordinal(where) for where in ("cuda:3", "cuda", "cpu", "cpu:0", "xpu:0")] == [
        *(3, 0),
        *(None, None, None),
    ]
