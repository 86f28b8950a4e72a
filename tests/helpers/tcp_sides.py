"""Two tcp transports by hand: in this process, in another, or a bare socket that misbehaves."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from mooncake_engine.config import EngineConfig, TcpConfig
from mooncake_engine.grants import GrantTable
from mooncake_engine.iovec import address_of
from mooncake_engine.memory import RegionTable
from mooncake_engine.transport.tcp import TcpTransport, wire
from mooncake_engine.types import Op, Region, SegmentRecord, Slice, uint64s

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike, NDArray


class Side:
    """One engine's worth of tcp: its memory, its grants, its transport."""

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        incarnation: str = "first",
        size: int = 1 << 20,
        **tcp: object,
    ) -> None:
        fields = {"min_port": 0, "max_port": 0, **tcp}
        self.config = EngineConfig(
            host=host, connect_timeout_s=1.0, tcp=msgspec.convert(fields, TcpConfig)
        )
        self.memory = np.zeros(size, np.uint8)
        self.address = address_of(self.memory)
        self.regions = RegionTable()
        self.regions.add(Region(self.address, size, "cpu", self.memory))
        self.grants = GrantTable()
        self.incarnation = incarnation
        self.transport = TcpTransport(self.config, self.regions, self.grants, incarnation)

    @property
    def record(self) -> SegmentRecord:
        return SegmentRecord(
            name="peer",
            incarnation=self.incarnation,
            machine_id="here",
            regions=self.regions.records(),
            endpoints={"tcp": self.transport.endpoint()},
        )

    @property
    def port(self) -> int:
        return port_of(self.record)


class OtherProcess:
    """A serving side in a process of its own; its memory is 1 MiB of sevens."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("tcp_peer_process.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout
        line = bytes.fromhex(self._process.stdout.readline().decode())
        self.record = msgspec.msgpack.decode(line, type=SegmentRecord)

    @property
    def pid(self) -> int:
        return self._process.pid

    def stop(self) -> None:
        """SIGSTOP, and wait until it took effect on every thread: the signal alone does not."""
        os.kill(self.pid, signal.SIGSTOP)
        tasks = Path(f"/proc/{self.pid}/task")
        until(
            lambda: all(
                (task / "stat").read_text().rpartition(")")[2].split()[0] == "T"
                for task in tasks.iterdir()
            ),
            "the stop of the other process",
        )

    def close(self) -> None:
        self._process.kill()  # also ends a stopped one
        self._process.communicate()


def port_of(record: SegmentRecord) -> int:
    port: int = msgspec.msgpack.decode(record.endpoints["tcp"])["port"]
    return port


def slice_of(
    op: Op, local: ArrayLike, remote: ArrayLike, lengths: ArrayLike, grant: bytes = b""
) -> Slice:
    sizes = uint64s(lengths)
    return Slice(op, uint64s(local), uint64s(remote), sizes, int(sizes.sum()), grant)


def soon(seconds: float = 10.0) -> float:
    return time.monotonic() + seconds


def until(condition: Callable[[], object], what: str, seconds: float = 10.0) -> None:
    """Wait for something that announces itself nowhere: a byte in memory, a thread's end."""
    deadline = soon(seconds)
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.001)


def scattered(
    random: np.random.Generator, size: int, count: int, longest: int
) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Offsets and lengths of `count` runs inside `size` bytes that do not overlap, shuffled."""
    room = size // count
    lengths = random.integers(1, min(longest, room) + 1, count).astype(np.uint64)
    slack = room - lengths.astype(np.int64)
    offsets = np.arange(count) * room + random.integers(0, slack + 1)
    order = random.permutation(count)
    return offsets.astype(np.uint64)[order], lengths[order]


def record_of(host: str, port: int, incarnation: str = "first") -> SegmentRecord:
    endpoint = {"host": host, "port": port, "version": wire.VERSION}
    blob = msgspec.Raw(msgspec.msgpack.encode(endpoint))
    return SegmentRecord(
        name="peer", incarnation=incarnation, machine_id="here", endpoints={"tcp": blob}
    )


def greeted_socket(port: int, incarnation: str = "first") -> socket.socket:
    """A bare connection whose handshake is done: the frames are up to the test."""
    sock = socket.create_connection(("127.0.0.1", port))
    sock.settimeout(10)
    sock.sendall(wire.pack_hello(incarnation))
    answer = sock.recv(wire.WELCOME.size, socket.MSG_WAITALL)
    assert wire.unpack_welcome(answer).verdict is wire.Verdict.WELCOME
    return sock


def received_until_the_end(sock: socket.socket) -> bytes:
    """All that still arrives before the other side closed or reset."""
    parts = []
    try:
        while part := sock.recv(1 << 20):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)
