"""One region registered with every device, or with none."""

from __future__ import annotations

import concurrent.futures
import contextlib
from typing import TYPE_CHECKING

from mooncake_engine.device import is_device
from mooncake_engine.errors import PathUnavailable
from mooncake_engine.transport.rdma import memlock
from mooncake_engine.transport.rdma.remedies import refused, unlocked
from mooncake_engine.transport.rdma.verbs.base import Access, VerbsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from mooncake_engine.config import RdmaConfig
    from mooncake_engine.transport.rdma.gpu import Gpu
    from mooncake_engine.transport.rdma.verbs.base import Device, MemoryRegion
    from mooncake_engine.types import Region

#: From here on threads pay by `auto`: one pins about 10 GB/s (Mooncake#848: 500 GB in 49 s, by
#: threads in 11.7 s).
_WORTH_THREADS = 1 << 30
#: "No limit" is not one thread for each of 10,000 chunks: they meet at the kernel's locks.
_MOST_THREADS = 64

_PAGE = 4 << 10


class Pinning:
    """How this engine registers memory. Safe from any thread."""

    def __init__(self, devices: Sequence[Device], config: RdmaConfig, gpu: Gpu) -> None:
        """Args: gpu: registers memory of GPUs."""
        self.devices = tuple(devices)
        self._config = config
        self._gpu = gpu

    def register(self, region: Region, chunks: Sequence[tuple[int, int]]) -> list[MemoryRegion]:
        """Register each chunk with each device. Blocks while the pages are pinned.

        Returns:
            Those of the first chunk, in the order of the devices, then those of the next.

        Raises:
            PathUnavailable: Says which device refused what, and what to try. Nothing is registered.
        """
        on_host = not is_device(region.location)
        if on_host:
            self._check_limit(region, chunks)
        jobs = [(device, *chunk) for chunk in chunks for device in self.devices]
        access = self._access(on_host=on_host)
        made: list[MemoryRegion | None] = [None] * len(jobs)

        def make(number: int) -> None:
            device, address, length = jobs[number]
            if on_host:
                made[number] = device.register(address, length, access)
            else:
                made[number] = self._gpu.register(device, address, length, access, region.location)

        try:
            _each(make, len(jobs), self._threads(region.length, len(jobs)))
        except BaseException as error:
            # What cannot be undone either goes with its device; the first error says what is wrong.
            with contextlib.suppress(PathUnavailable):
                deregister(region, (done for done in made if done is not None))
            if isinstance(error, VerbsError):
                raise refused(region, error, len(self.devices)) from error
            raise
        return [done for done in made if done is not None]

    def _check_limit(self, region: Region, chunks: Sequence[tuple[int, int]]) -> None:
        pages = sum(-(-(at % _PAGE + length) // _PAGE) for at, length in chunks)
        refusal = memlock.read().refusal(pages * _PAGE * len(self.devices))
        if refusal is not None:
            raise unlocked(region, [device.name for device in self.devices], refusal)

    def _access(self, *, on_host: bool) -> Access:
        access = Access.LOCAL_WRITE | Access.REMOTE_READ | Access.REMOTE_WRITE
        relaxed = self._config.relaxed_ordering
        if relaxed == 1 or (relaxed == 2 and not on_host):
            access |= Access.RELAXED_ORDERING
        return access

    def _threads(self, nbytes: int, jobs: int) -> int:
        wish = self._config.parallel_registration
        if wish == 0 or (wish == -1 and nbytes <= _WORTH_THREADS):
            return 1
        return min(jobs, self._config.max_concurrent_registrations or _MOST_THREADS)


def deregister(region: Region, registrations: Iterable[MemoryRegion]) -> None:
    """Take all of them back, also when one refuses.

    Raises:
        PathUnavailable: One did; a NIC may still reach that memory.
    """
    try:
        with contextlib.ExitStack() as closing:
            for registration in registrations:
                closing.callback(registration.close)
    except VerbsError as error:
        raise PathUnavailable(
            f"cannot deregister the {region.length} bytes at {region.address:#x}: "
            f"{error.strerror}; a NIC may still reach them: keep that memory until the engine is "
            "closed"
        ) from error


def _each(make: Callable[[int], None], count: int, threads: int) -> None:
    """Call make(0) .. make(count - 1); after the first error start no more, and raise it."""
    if threads <= 1:
        for number in range(count):
            make(number)
        return
    with concurrent.futures.ThreadPoolExecutor(threads, "rdma-register") as pool:
        futures = [pool.submit(make, number) for number in range(count)]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
