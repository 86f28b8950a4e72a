"""Runs the distribution's ib_read_bw and ib_write_bw, a program at each end."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

# "65536 50 13.77 13.10 0.000210": bytes, iterations, peak, average (2**20 bytes a second), Mpps
RESULT = re.compile(r"^\s*(\d+)\s+(\d+)\s+([\d.]+)\s+([\d.]+)\s+([\d.]+)\s*$", re.MULTILINE)
LISTENS = "0A"  # the kernel's TCP_LISTEN
WAIT_S = 60.0
LIMIT_S = 600  # of one program, also when whoever started it was killed
PROGRAMS = {"read": "ib_read_bw", "write": "ib_write_bw"}


class PerftestFailed(RuntimeError):
    """One end ended badly; the message holds what it said."""


class Link(NamedTuple):
    """From one device to another, and how: what both programs are told alike."""

    ours: str
    theirs: str
    address: str  # of `theirs`, for perftest's own exchange over TCP
    gid_index: int = 1  # -1: perftest chooses
    queue_pairs: int = 2
    depth: int = 32
    reads: int = 16  # under way, as initiator and as target
    mtu: int = 4096  # 0: the port's

    def command(self, op: str, nbytes: int, iterations: int, port: int) -> list[str]:
        """What both ends are started with, but for the device.

        Args:
            op: "read" or "write".
            nbytes: Of one request.
            iterations: Requests on each queue pair.
            port: For perftest's own exchange.
        """
        # Fewer iterations than the depth would silently make the depth smaller.
        assert iterations >= self.depth
        command = ["timeout", str(LIMIT_S), PROGRAMS[op], "-F", "-p", str(port), "-s", str(nbytes)]
        command += ["-n", str(iterations), "-q", str(self.queue_pairs), "-t", str(self.depth)]
        if self.gid_index >= 0:
            command += ["-x", str(self.gid_index)]
        if self.mtu:
            command += ["-m", str(self.mtu)]
        if op == "read":
            command += ["-o", str(self.reads)]
        return command


def missing() -> str:
    """Why it cannot run here, as one sentence; empty when it can."""
    absent = [program for program in PROGRAMS.values() if shutil.which(program) is None]
    return f"{' and '.join(absent)} not found: apt install perftest" if absent else ""


def mib_per_s(op: str, path: Link, nbytes: int, iterations: int, port: int) -> float:
    """Average of `iterations` requests of `nbytes` on each queue pair, both ends here."""
    command = path.command(op, nbytes, iterations, port)
    with start_server(command, path.theirs, port) as server:
        try:
            rate = run_client(command, path.ours, path.address)
            said, _ = server.communicate(timeout=WAIT_S)
        except PerftestFailed as failed:
            server.terminate()
            raise PerftestFailed(f"{failed}; other end: {server.communicate()[0]}") from failed
        finally:
            server.terminate()
    if server.returncode:
        raise PerftestFailed(f"{' '.join(command)}, the end that is asked: {said}")
    return rate


def start_server(command: list[str], device: str, port: int) -> subprocess.Popen[str]:
    """The end that is asked; returns when it listens on `port`. It serves one client and ends."""
    server = subprocess.Popen(  # noqa: S603 - perftest's programs, no shell
        [*command, "-d", device], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + WAIT_S
    while not _listened_on(port):  # a connection to look would be taken for the client's
        if server.poll() is not None or time.monotonic() > deadline:
            server.terminate()
            said, _ = server.communicate()
            raise PerftestFailed(f"perftest's server does not listen on port {port}: {said}")
        time.sleep(0.05)
    return server


def run_client(command: list[str], device: str, address: str) -> float:
    """The end that asks; MiB/s on average."""
    client = [*command, "-d", device, address]
    done = subprocess.run(client, capture_output=True, text=True, check=False)  # noqa: S603 - ditto
    found = RESULT.search(done.stdout)
    if done.returncode or found is None:
        raise PerftestFailed(f"{' '.join(client)}: {done.stdout}{done.stderr}")
    return float(found[4])


def _listened_on(port: int) -> bool:
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            if state == LISTENS and int(local.rpartition(":")[2], 16) == port:
                return True
    return False
