"""The two Soft-RoCE rails of the guest: taken down, raised again, and counted on the wire.

Rail A joins rxe0 and rxe1, rail B rxe2 and rxe3; `scripts/lib/guest/rails.sh` made them. A port's
state proves nothing (rxe moves bytes between queue pairs of one device while it is DOWN), so bytes
are counted where they leave: on each device's end of its pair.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "lib" / "guest" / "rails.sh"
SYSFS = Path("/sys/class/infiniband")
_NETWORK = Path("/sys/class/net")


class Rail(NamedTuple):
    """One pair: its name in rails.sh, its two devices, and their addresses."""

    pair: str
    devices: tuple[str, str]
    addresses: tuple[str, str]


A = Rail("A", ("rxe0", "rxe1"), ("10.77.0.10", "10.77.0.11"))
B = Rail("B", ("rxe2", "rxe3"), ("10.78.0.10", "10.78.0.11"))


def in_guest() -> bool:
    """True in the guest, the only place where a rail can be taken down."""
    return os.environ.get("MOONCAKE_GUEST") == "1"


def _script(what: str, rail: Rail) -> None:
    assert in_guest(), "rails are taken down in the guest only; run `scripts/test rdma`"
    done = subprocess.run(
        ["bash", "-e", str(SCRIPT), what, rail.pair], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"rails.sh {what} {rail.pair}: {done.stderr}"


def lower(rail: Rail) -> None:
    """Take both ends down. What is under way is lost, and the next request finds no route."""
    _script("lower", rail)


def lift(rail: Rail) -> None:
    """Bring both ends up, with their routes and neighbours; one that is up stays as it is."""
    states = {(_NETWORK / interface(end) / "operstate").read_text() for end in rail.devices}
    if states != {"up\n"}:
        _script("raise", rail)


@contextlib.contextmanager
def lowered(*rails: Rail) -> Iterator[None]:
    """Down inside, up again afterwards."""
    try:
        for rail in rails:
            lower(rail)
        yield
    finally:
        for rail in rails:
            lift(rail)


def interface(device: str) -> str:
    """The network interface below an RDMA device."""
    return (SYSFS / device / "ports/1/gid_attrs/ndevs/0").read_text().strip()


def bytes_sent(device: str) -> int:
    """Bytes that left by this device's interface since it was made, frames' headers included."""
    return _interface_count(device, "tx_bytes")


def bytes_received(device: str) -> int:
    """Bytes that came in by this device's interface."""
    return _interface_count(device, "rx_bytes")


def _interface_count(device: str, what: str) -> int:
    return int((_NETWORK / interface(device) / "statistics" / what).read_text())


def counters(device: str) -> dict[str, int]:
    """The driver's own counters: sent_pkts, rcvd_pkts, completer_retry_err, rdma_sends, ..."""
    folder = SYSFS / device / "ports/1/hw_counters"
    return {
        path.name: int(path.read_text()) for path in folder.iterdir() if path.name != "lifespan"
    }
