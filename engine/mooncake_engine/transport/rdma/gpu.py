"""Memory of GPUs: how NICs get at it, chosen by what the machine has, and how their writes show.

By DMA-BUF the CUDA driver exports a range as a descriptor, which the NIC's driver imports. By the
older nvidia-peermem module plain registration works on addresses of a GPU. Neither is a property
of verbs: without one of them `ibv_reg_mr` of such an address fails with EFAULT.
"""

from __future__ import annotations

import ctypes
import enum
import logging
import mmap
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mooncake_engine.errors import LaneError, PathUnavailable
from mooncake_engine.transport.rdma.cuda import TO_OWNER, Attribute, CudaError, Driver
from mooncake_engine.types import Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from mooncake_engine.config import RdmaConfig
    from mooncake_engine.transport.rdma.verbs.base import Access, Device, MemoryRegion

_log = logging.getLogger(__name__)

_INSTALL = (
    "use NVIDIA's open kernel modules (driver 515 or newer, Linux 5.12 or newer) for DMA-BUF, or "
    "load the other way's module: modprobe nvidia-peermem"
)
_MODULES = ("nvidia_peermem", "nv_peer_mem")  # the driver's own; the one of before 2021


class Way(enum.Enum):
    """How NICs reach memory of GPUs."""

    DMABUF = "DMA-BUF"
    PEERMEM = "nvidia-peermem"
    NONE = "none"


class _Found(NamedTuple):
    way: Way
    reason: str
    driver: Driver | None = None
    unordered: frozenset[int] = frozenset()  # GPUs that need a flush
    pci_addresses: tuple[str, ...] = ()


class Gpu:
    """Registers memory of GPUs. Safe from any thread.

    Nothing is looked up, and CUDA not touched, before the first question.
    """

    def __init__(
        self,
        config: RdmaConfig,
        *,
        load: Callable[[str], Any] = ctypes.CDLL,
        sysfs: Path = Path("/sys"),
    ) -> None:
        """Args: load, sysfs: where libcuda and the kernel's modules are found; others in tests."""
        self._peermem_wanted = config.nvidia_peermem
        self._load = load
        self._sysfs = sysfs
        self._lock = threading.Lock()  # guards _asked
        self._asked: _Found | None = None

    @property
    def way(self) -> Way:
        """How this machine does it."""
        return self._found().way

    @property
    def reason(self) -> str:
        """Why it is done this way; for NONE, what to install."""
        return self._found().reason

    def register(
        self, device: Device, address: int, length: int, access: Access, location: str
    ) -> MemoryRegion:
        """Register memory of a GPU with a NIC.

        Raises:
            PathUnavailable: No way on this machine, or CUDA refuses; the message says what to do.
            VerbsError: The NIC refuses.
        """
        found = self._found()
        gpu = ordinal(location)
        if found.way is Way.PEERMEM:
            return device.register(address, length, access)
        if found.driver is None or found.way is Way.NONE or gpu is None:
            raise PathUnavailable(
                f"cannot register {length} bytes at {address:#x} on {location} with "
                f"{device.name}: {found.reason}"
            )
        page = mmap.PAGESIZE
        start = address // page * page
        span = -(-(address + length - start) // page) * page
        try:
            fd = found.driver.export(gpu, start, span)
        except CudaError as error:
            raise PathUnavailable(
                f"cannot export {span} bytes at {start:#x} on {location} as DMA-BUF for "
                f"{device.name}: {error}; {_why_not(found.driver, gpu, start, span)}"
            ) from error
        try:
            return device.register_dmabuf(fd, address - start, length, address, access)
        finally:
            os.close(fd)  # the registration holds the buffer

    def flush_writes(self, gpu: int) -> None:
        """Make a NIC's writes that completed visible to the GPU "cuda:<gpu>".

        Whoever hands memory of a GPU on calls it after the last completion: the lane that READ
        into it, and the target when its peer says that it has written. Most machines order those
        writes themselves; there it returns at once.

        Raises:
            LaneError: CUDA refuses; the bytes must not be used.
        """
        found = self._found()
        if gpu in found.unordered and found.driver is not None:
            try:
                found.driver.flush(gpu)
            except CudaError as error:
                raise LaneError(
                    Status.FAILED, f"cannot make a NIC's writes to cuda:{gpu} visible: {error}"
                ) from error

    def pci_addresses(self) -> tuple[str, ...]:
        """PCI address of "cuda:0", "cuda:1" and so on; empty where NICs reach no GPU."""
        return self._found().pci_addresses

    def _found(self) -> _Found:
        with self._lock:
            if self._asked is None:
                self._asked = self._look()
                _log.info(
                    "GPU memory over RDMA: %s (%s)", self._asked.way.value, self._asked.reason
                )
            return self._asked

    def _look(self) -> _Found:
        module = next((m for m in _MODULES if (self._sysfs / "module" / m).exists()), None)
        try:
            driver = Driver(self._load)
            gpus = range(driver.count())
            exports = all(driver.attribute(gpu, Attribute.DMA_BUF_SUPPORTED) for gpu in gpus)
            unordered = frozenset(gpu for gpu in gpus if _unordered(driver, gpu))
            addresses = tuple(map(driver.pci_address, gpus))
        except CudaError as error:
            return _Found(Way.NONE, f"no usable NVIDIA GPU: {error}")
        if not gpus:
            return _Found(Way.NONE, "CUDA_VISIBLE_DEVICES leaves no GPU")
        for gpu in unordered:
            if not driver.attribute(gpu, Attribute.GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS) & 1:
                why = f"cuda:{gpu} can neither order nor flush what NICs write"
                return _Found(Way.NONE, f"{why}; update its driver")
        if self._peermem_wanted and module is None:
            why = "WITH_NVIDIA_PEERMEM=1 (rdma.nvidia_peermem), but that module is not loaded"
            return _Found(Way.NONE, f"{why}: modprobe nvidia-peermem, or unset it")
        if self._peermem_wanted:
            reason = f"asked for by WITH_NVIDIA_PEERMEM=1; {module} is loaded"
            return _Found(Way.PEERMEM, reason, driver, unordered, addresses)
        if exports:
            reason = "the CUDA driver exports it; WITH_NVIDIA_PEERMEM=1 would take nvidia-peermem"
            return _Found(Way.DMABUF, reason, driver, unordered, addresses)
        if module is not None:
            reason = f"the CUDA driver exports no DMA-BUF; {module} is loaded"
            return _Found(Way.PEERMEM, reason, driver, unordered, addresses)
        return _Found(
            Way.NONE,
            f"the CUDA driver exports no DMA-BUF, and nvidia-peermem is not loaded; {_INSTALL}",
        )


def ordinal(location: str) -> int | None:
    """The N of "cuda:N"; None for other memory."""
    kind, _, number = location.partition(":")
    return int(number or 0) if kind == "cuda" else None


def gpus_of(locations: Iterable[str]) -> tuple[int, ...]:
    """The GPUs among memory locations, once each."""
    found = {ordinal(location) for location in locations}
    return tuple(sorted(gpu for gpu in found if gpu is not None))


def _unordered(driver: Driver, gpu: int) -> bool:
    return driver.attribute(gpu, Attribute.GPU_DIRECT_RDMA_WRITES_ORDERING) < TO_OWNER


def _why_not(driver: Driver, gpu: int, start: int, span: int) -> str:
    """Torch's expandable segments are many mappings side by side; an export takes one."""
    try:
        base, length = driver.allocation(gpu, start)
    except CudaError as error:
        return f"it is no memory of that GPU ({error})"
    if start + span > base + length:
        return (
            f"it spans several mappings (the first has {length} bytes at {base:#x}); "
            "set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False"
        )
    return "WITH_NVIDIA_PEERMEM=1 with the nvidia-peermem module is the other way"
