"""The distribution's ib_read_bw and ib_write_bw between two devices of this machine."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

# "65536 50 13.77 13.10 0.000210": bytes, iterations, peak, average (2**20 bytes a second), Mpps
RESULT = re.compile(r"^\s*(\d+)\s+(\d+)\s+([\d.]+)\s+([\d.]+)\s+([\d.]+)\s*$", re.MULTILINE)
LISTENS = "0A"  # the kernel's TCP_LISTEN
WAIT_S = 60.0


class PerftestFailed(RuntimeError):
    """One end ended badly; the message holds what it said."""


class Link(NamedTuple):
    """From one device to another, and how: what both programs are told alike."""

    ours: str
    theirs: str
    address: str  # of `theirs`, for perftest's own exchange over TCP
    gid_index: int = 1
    queue_pairs: int = 2
    depth: int = 32
    reads: int = 16  # under way, as initiator and as target
    mtu: int = 4096


def mib_per_s(op: str, path: Link, nbytes: int, iterations: int, port: int) -> float:
    """Average of `iterations` requests of `nbytes` on each queue pair; `op`: read or write."""
    # Fewer iterations than the depth would silently make the depth smaller.
    assert iterations >= path.depth
    command = [
        *(f"ib_{op}_bw", "-F", "-x", str(path.gid_index), "-m", str(path.mtu), "-p", str(port)),
        *("-s", str(nbytes), "-n", str(iterations), "-q", str(path.queue_pairs)),
        *("-t", str(path.depth)),
    ]
    if op == "read":
        command += ("-o", str(path.reads))
    with subprocess.Popen(
        [*command, "-d", path.theirs], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        try:
            _await_listener(port, server)
            client = [*command, "-d", path.ours, path.address]
            done = subprocess.run(client, capture_output=True, text=True, check=False)
            said, _ = server.communicate(timeout=WAIT_S)
        finally:
            server.kill()
    found = RESULT.search(done.stdout)
    if done.returncode or server.returncode or found is None:
        raise PerftestFailed(f"{' '.join(client)}: {done.stdout}{done.stderr}; other end: {said}")
    return float(found[4])


def _await_listener(port: int, server: subprocess.Popen[str]) -> None:
    """Until `port` is listened on. A connection to look would be taken for the client's."""
    deadline = time.monotonic() + WAIT_S
    while not _listened_on(port):
        if server.poll() is not None or time.monotonic() > deadline:
            server.kill()
            said, _ = server.communicate()
            raise PerftestFailed(f"perftest's server does not listen on port {port}: {said}")
        time.sleep(0.05)


def _listened_on(port: int) -> bool:
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            if state == LISTENS and int(local.rpartition(":")[2], 16) == port:
                return True
    return False
