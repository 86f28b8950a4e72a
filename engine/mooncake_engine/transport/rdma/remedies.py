"""Why memory could not be registered, and what to try: one table, by errno."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from mooncake_engine.device import is_device
from mooncake_engine.errors import PathUnavailable
from mooncake_engine.transport.rdma import memlock

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mooncake_engine.transport.rdma.verbs.base import VerbsError
    from mooncake_engine.types import Region

_TOO_MANY = (
    "the device has no room for another registration: register fewer and longer regions, raise "
    "MC_MAX_MR_SIZE (rdma.max_mr_bytes) if it is low, or end other processes that use the device"
)

_REMEDIES = {
    errno.ENOMEM: (
        "either the locked-memory limit is used up (`ulimit -l unlimited`; docker run --ulimit "
        "memlock=-1), or the device is out of registrations or of translation entries: register "
        "fewer and longer regions, or back them by huge pages"
    ),
    errno.EFAULT: (
        "not all of it is mapped, or it is mapped read-only (PROT_READ): peers write into "
        "registered memory, so map it PROT_READ|PROT_WRITE"
    ),
    errno.ENOSPC: _TOO_MANY,
    errno.EMFILE: _TOO_MANY,
    errno.ENFILE: _TOO_MANY,
    errno.EAGAIN: (
        "a limit of this process's control group is reached: raise hca_object in its rdma.max"
    ),
    errno.EINVAL: (
        "the device does not take such a region: lower MC_MAX_MR_SIZE (rdma.max_mr_bytes), or set "
        "MC_IB_PCI_RELAXED_ORDERING=0 if the device is old"
    ),
    errno.EOPNOTSUPP: (
        "the device's driver cannot do this; for GPU memory it takes a NIC driver with DMA-BUF "
        "(mlx5, Linux 5.12) or the nvidia-peermem module and WITH_NVIDIA_PEERMEM=1"
    ),
    errno.EPERM: "this process may not: give it access to /dev/infiniband",
}


def refused(region: Region, error: VerbsError, devices: int) -> PathUnavailable:
    """What is raised for a region that a device did not take.

    Args:
        region: The whole of it.
        error: Which chunk it was, which device and the errno.
        devices: How many register each byte, which the locked-memory limit counts.
    """
    code = error.errno or 0
    remedy = _REMEDIES.get(code, "see `dmesg` for what the driver says")
    if code == errno.ENOMEM and not is_device(region.location):
        remedy = memlock.read().refusal(region.length * devices) or remedy
    name = errno.errorcode.get(code, str(code))
    return PathUnavailable(f"{_attempted(region)}: {error.strerror} ({name}); {remedy}")


def unlocked(region: Region, devices: Sequence[str], refusal: str) -> PathUnavailable:
    """What is raised for a region that the locked-memory limit forbids, before it is tried."""
    return PathUnavailable(f"{_attempted(region)} with {', '.join(devices)}: {refusal}")


def _attempted(region: Region) -> str:
    where = f"{region.length} bytes at {region.address:#x} ({region.location})"
    return f"cannot register {where} for RDMA"
