"""The limit of locked memory: seen before anything is registered, and explained.

A NIC's memory is pinned, and the kernel counts it against RLIMIT_MEMLOCK once per registration,
so once per NIC (`__ib_umem_get` in drivers/infiniband/core/umem.c). It refuses with ENOMEM, which
says little. Shells and containers have 8 MiB unless somebody raised it.
"""

from __future__ import annotations

import resource
from pathlib import Path
from typing import NamedTuple

#: Below this no useful amount of KV cache can be registered.
LEAST = 64 << 20

_CAP_IPC_LOCK = 14
_REMEDY = (
    "raise it with `ulimit -l unlimited` (memlock in /etc/security/limits.conf, "
    "LimitMEMLOCK=infinity in a systemd unit, docker run --ulimit memlock=-1), or grant "
    "CAP_IPC_LOCK (docker run --cap-add IPC_LOCK)"
)


class Limit(NamedTuple):
    """What this process may pin."""

    allowed: int | None  # bytes; None: any number
    pinned: int  # bytes that it has pinned already

    def refusal(self, wanted: int) -> str | None:
        """Why `wanted` more bytes cannot be pinned, and what to do; None: they can.

        Args:
            wanted: Bytes, counted once for each NIC.
        """
        if self.allowed is None or self.pinned + wanted <= self.allowed:
            return None
        return (
            f"pinning {wanted} bytes (counted once for each NIC) beside the {self.pinned} pinned "
            f"already exceeds the locked-memory limit of {self.allowed} bytes; {_REMEDY}"
        )

    def refusal_at_start(self) -> str | None:
        """Why it makes no sense to start at all, and what to do; None: it does."""
        if self.allowed is None or self.allowed >= LEAST:
            return None
        return (
            f"the locked-memory limit is {self.allowed} bytes, and RDMA pins all the memory that "
            f"it moves; {_REMEDY}"
        )


def read(process: Path = Path("/proc/self")) -> Limit:
    """The limit as the kernel will apply it.

    Args:
        process: Its folder in /proc; another one in tests.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    status = dict(
        line.split(":", 1) for line in (process / "status").read_text().splitlines() if ":" in line
    )
    pinned = int(status.get("VmPin", "0 kB").split()[0]) << 10
    capable = bool(int(status.get("CapEff", "0"), 16) >> _CAP_IPC_LOCK & 1)
    unlimited = soft == resource.RLIM_INFINITY or (capable and _in_first_user_namespace(process))
    return Limit(None if unlimited else soft, pinned)


def _in_first_user_namespace(process: Path) -> bool:
    """The kernel asks for the capability there: in a rootless container it is void."""
    try:
        rows = (process / "uid_map").read_text().split()
    except FileNotFoundError:  # a kernel without user namespaces
        return True
    return rows == ["0", "0", str((1 << 32) - 1)]
