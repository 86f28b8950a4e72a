"""A transport of your own in one file, and the proof that it keeps the contract.

    python examples/own_transport.py               runs the engine's conformance suite over it

It moves bytes through /proc/<pid>/mem: no server, no copy but the one, same machine only. A
toy beside the built-in `shm`, which does the same with one system call per thousand runs; the
four classes and what each must promise are those of any transport (`transport/base.py`).
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from typing import TYPE_CHECKING, ClassVar

import msgspec
from mooncake_engine import (
    EngineConfig,
    MetadataConfig,
    Op,
    PathUnavailable,
    Status,
    TcpConfig,
    TransferEngine,
    register_transport,
)
from mooncake_engine.errors import LaneError
from mooncake_engine.testing import conformance
from mooncake_engine.testing.target import LocalTarget
from mooncake_engine.transport.base import Capabilities, Lane, Link, Transport

if TYPE_CHECKING:
    from mooncake_engine import Segment, SegmentRecord
    from mooncake_engine.config import EngineConfig as Config
    from mooncake_engine.grants import GrantTable
    from mooncake_engine.memory import RegionTable
    from mooncake_engine.types import Slice

PR_SET_PTRACER, ANY = 0x59616D61, ctypes.c_ulong(-1)  # linux/prctl.h; for Yama's ptrace_scope 1


class Endpoint(msgspec.Struct, frozen=True, array_like=True):
    """What a peer must know: who we are, and a secret in our memory that proves it."""

    pid: int
    address: int
    proof: bytes


class ProcMemTransport(Transport):
    """Once per engine: offers our memory by publishing our pid, connects to peers by theirs."""

    scheme: ClassVar[str] = "procmem"
    capabilities: ClassVar[Capabilities] = Capabilities(same_machine_only=True)

    def __init__(
        self, config: Config, regions: RegionTable, grants: GrantTable, incarnation: str
    ) -> None:
        super().__init__(config, regions, grants, incarnation)
        self._proof = ctypes.create_string_buffer(os.urandom(32), 32)
        ctypes.CDLL(None).prctl(PR_SET_PTRACER, ANY, 0, 0, 0)

    def endpoint(self) -> msgspec.Raw:
        """Goes into the engine's record in the metadata store."""
        mine = Endpoint(os.getpid(), ctypes.addressof(self._proof), self._proof.raw)
        return msgspec.Raw(msgspec.msgpack.encode(mine))

    def connect(self, peer: SegmentRecord) -> Link:
        """Prove that the peer is reachable, or say why it is not."""
        if self.scheme not in peer.endpoints:
            raise PathUnavailable(f"{peer.name} does not run {self.scheme}")
        there = msgspec.msgpack.decode(peer.endpoints[self.scheme], type=Endpoint)
        link = ProcMemLink(there, peer.name)
        try:
            link.open_lane().close()
        except LaneError as error:
            raise PathUnavailable(str(error)) from error
        return link

    def close(self) -> None:
        """Wipe the proof: whoever moves bytes now finds out that we are gone."""
        ctypes.memset(self._proof, 0, 32)


class ProcMemLink(Link):
    """One peer. Two lanes are two threads that copy."""

    lanes = 2

    def __init__(self, peer: Endpoint, name: str) -> None:
        self._peer = peer
        self._name = name

    def open_lane(self) -> Lane:
        """A lane of our own file descriptor; `LaneError` when the peer is not there any more."""
        try:
            memory = os.open(f"/proc/{self._peer.pid}/mem", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise LaneError(
                Status.PEER_GONE, f"opening the memory of {self._name}: {error}"
            ) from error
        lane = ProcMemLane(memory, self._peer, self._name)
        try:
            lane.confirm()
        except LaneError:
            lane.close()
            raise
        return lane

    def close(self) -> None:
        """Lanes hold everything."""


class ProcMemLane(Lane):
    """Moves one slice at a time, in the thread that the engine gives it."""

    def __init__(self, memory: int, peer: Endpoint, name: str) -> None:
        self._memory = memory
        self._peer = peer
        self._name = name
        self._interrupted = threading.Event()
        self._closed = False

    def confirm(self) -> None:
        """Raise unless the peer's secret is still in its place."""
        try:
            found = os.pread(self._memory, len(self._peer.proof), self._peer.address)
        except OSError:
            found = b""
        if found != self._peer.proof:
            raise LaneError(Status.PEER_GONE, f"{self._name} has ended or closed its engine")

    def move(self, piece: Slice, deadline: float) -> None:
        """Return when every byte is in place; nothing touches local memory after the return."""
        call = os.preadv if piece.op is Op.READ else os.pwritev
        self.confirm()  # before a write: it must not hit whoever has that address now
        for local, remote, length in zip(
            piece.local.tolist(), piece.remote.tolist(), piece.lengths.tolist(), strict=True
        ):
            view = memoryview((ctypes.c_char * length).from_address(local)).cast("B")
            done = 0
            while done < length:
                self._check(deadline)
                done += self._call(call, view[done:], remote + done)
        self.confirm()  # after a read: the bytes were the living peer's

    def _call(self, call, view: memoryview, address: int) -> int:  # noqa: ANN001 - preadv or pwritev
        try:
            moved: int = call(self._memory, [view], address)
        except OSError as error:
            self.confirm()  # a dead peer says so in many ways
            raise LaneError(
                Status.REFUSED, f"{len(view)} bytes at {address:#x} of {self._name}: {error}"
            ) from error
        if not moved:  # the process is gone and its memory with it
            raise LaneError(Status.PEER_GONE, f"{self._name} has ended")
        return moved

    def _check(self, deadline: float) -> None:
        if self._interrupted.is_set():
            raise LaneError(Status.CANCELLED, "the lane was interrupted")
        if time.monotonic() > deadline:
            raise LaneError(Status.TIMED_OUT, f"moving bytes of {self._name} took too long")

    def interrupt(self) -> None:
        """From any thread; one call moves 8 MiB at most, so `move` hears of it within ms."""
        self._interrupted.set()

    def close(self) -> None:
        """Idempotent, as every close."""
        if not self._closed:
            self._closed = True
            os.close(self._memory)


class OverProcMem(conformance.Pair):
    """The suite's two engines, made to use our transport."""

    def open(self) -> Segment:
        """`auto` would take the faster `shm`."""
        return self.initiator.open_segment(self.target.record, protocol=ProcMemTransport.scheme)


def main() -> None:
    """Run each check that applies; the first that fails ends this with its reason."""
    register_transport(ProcMemTransport)
    config = EngineConfig(
        host="127.0.0.1",
        tcp=TcpConfig(min_port=0, max_port=0),
        metadata=MetadataConfig(p2p_min_port=0, p2p_max_port=0),
    )
    for check in conformance.CHECKS:
        with LocalTarget(config, check.length) as target, TransferEngine(config) as initiator:
            # The target has no say: nobody but the kernel serves these bytes.
            pair = OverProcMem(initiator, target, target_has_a_say=False)
            if check.applies(pair):
                check.run(pair)
                print(f"kept: {check.name.replace('_', ' ')}")


if __name__ == "__main__":
    main()
