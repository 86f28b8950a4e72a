"""A process for the shm tests: a target that holds memory, or a reader with fewer rights.

`python shm_child.py target|reader|engine` takes one JSON object per line and answers one each.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import platform
import struct
import sys
import time

import msgspec
import numpy as np
from mooncake_engine.config import EngineConfig, MetadataConfig, ShmConfig, TcpConfig
from mooncake_engine.engine import TransferEngine
from mooncake_engine.errors import EngineError, LaneError
from mooncake_engine.grants import GrantTable
from mooncake_engine.iovec import address_of, libc
from mooncake_engine.memory import RegionTable
from mooncake_engine.transport.shm import ShmTransport
from mooncake_engine.types import Op, RegionRecord, SegmentRecord, Slice, uint64s

NOBODY = 65534
PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 4, 22, 38
PROCESS_VM = {"x86_64": (310, 311), "aarch64": (270, 271)}  # syscall numbers


def transport(**shm: object) -> ShmTransport:
    config = EngineConfig(connect_timeout_s=5, shm=msgspec.convert(shm, ShmConfig))
    return ShmTransport(config, RegionTable(), GrantTable(), os.urandom(8).hex())


def engine_config() -> EngineConfig:
    return EngineConfig(
        host="127.0.0.1",
        tcp=TcpConfig(min_port=0, max_port=0),
        metadata=MetadataConfig(backend="memory"),
    )


def digest(array: np.ndarray) -> str:
    return hashlib.blake2b(array.tobytes()).hexdigest()


def forbid_process_vm() -> None:
    """What a container's seccomp profile does: process_vm_* end with EPERM, for good."""
    readv, writev = PROCESS_VM[platform.machine()]
    load, equal, give = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
    program = b"".join(
        struct.pack("HBBI", *line)
        for line in (
            (load, 0, 0, 0),
            (equal, 1, 0, readv),
            (equal, 0, 1, writev),
            (give, 0, 0, 0x00050000 | 1),  # SECCOMP_RET_ERRNO | EPERM
            (give, 0, 0, 0x7FFF0000),  # SECCOMP_RET_ALLOW
        )
    )
    code = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", 5, ctypes.addressof(code)))
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        PR_SET_SECCOMP, 2, ctypes.addressof(header), 0, 0
    ):
        raise OSError(ctypes.get_errno(), "the kernel takes no seccomp filter")


class Target:
    """Holds a plain and an arena array of the sizes asked for, filled from a seed."""

    def __init__(
        self, *, plain: int = 0, arena: int = 0, hidden: bool = False, **shm: object
    ) -> None:
        if hidden:  # even processes of our user may not read us; root may, so it steps down
            libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
        self.transport = transport(**shm)
        self.mapping = mmap.mmap(-1, plain) if plain else None
        self.arrays = {}
        if self.mapping:
            self.arrays["plain"] = np.frombuffer(self.mapping, np.uint8)
        if arena:
            self.arrays["arena"] = self.transport.allocate(arena)
        for seed, array in enumerate(self.arrays.values()):
            array[:] = np.random.default_rng(seed).integers(0, 256, array.size, np.uint8)

    def about(self) -> dict[str, object]:
        record = SegmentRecord(
            name="the target",
            incarnation=self.transport.incarnation,
            machine_id="",
            regions=tuple(RegionRecord(address_of(a), a.size, "cpu") for a in self.arrays.values()),
            endpoints={"shm": self.transport.endpoint()},
        )
        return {
            "record": msgspec.msgpack.encode(record).hex(),
            "pid": os.getpid(),
            **{name: address_of(array) for name, array in self.arrays.items()},
        }

    def digest(self, which: str) -> str:
        return digest(self.arrays[which])

    def allocate(self, length: int) -> int:
        self.arrays["more"] = self.transport.allocate(length)
        self.arrays["more"][:] = 7
        return address_of(self.arrays["more"])

    def unmap_half(self) -> None:
        half = self.arrays["plain"].size // 2
        start = address_of(self.arrays.pop("plain"))
        if libc.munmap(ctypes.c_void_p(start + half), ctypes.c_size_t(half)):
            raise OSError(ctypes.get_errno(), "munmap")

    def fork(self) -> int:
        """A child that inherits every descriptor and lives on after us."""
        if child := os.fork():
            return child
        sys.stdin.read()
        os._exit(0)

    def close(self) -> None:
        self.transport.close()


class Reader:
    """Connects after giving up rights; reports results and errors as data."""

    def __init__(self, *, step_down: bool = False, seccomp: bool = False) -> None:
        self.transport = transport()
        if step_down and os.geteuid() == 0:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        if seccomp:
            forbid_process_vm()

    def about(self) -> dict[str, object]:
        return {"pid": os.getpid()}

    def connect(self, record: str) -> str:
        peer = msgspec.msgpack.decode(bytes.fromhex(record), type=SegmentRecord)
        try:
            self.link = self.transport.connect(peer)
        except EngineError as error:
            return f"{type(error).__name__}: {error}"
        self.lane = self.link.open_lane()
        return "connected"

    def move(self, op: str, remote: list[int], lengths: list[int], value: int = 0) -> list[str]:
        """[status, digest of the local bytes or error]."""
        local = np.full(sum(lengths), value, np.uint8)
        at = address_of(local) + np.cumsum([0, *lengths[:-1]])
        piece = Slice(Op(op), uint64s(at), uint64s(remote), uint64s(lengths), local.size, grant=b"")
        try:
            self.lane.move(piece, time.monotonic() + 10)
        except LaneError as error:
            return [error.status, str(error)]
        return ["ok", digest(local)]

    def close(self) -> None:
        self.lane.close()
        self.link.close()
        self.transport.close()


class Engine:
    """A whole engine that may not use process_vm calls."""

    def __init__(self) -> None:
        self.engine = TransferEngine(engine_config())
        forbid_process_vm()

    def about(self) -> dict[str, object]:
        return {"pid": os.getpid()}

    def read(self, record: str, remote: int, length: int) -> list[str]:
        """[path, status, digest of what arrived]."""
        peer = msgspec.msgpack.decode(bytes.fromhex(record), type=SegmentRecord)
        local = self.engine.allocate(length)
        segment = self.engine.open_segment(peer)
        batch = self.engine.submit("read", segment, [(address_of(local), remote, length)])
        completion = batch.wait(20)
        return [completion.path.scheme, completion.status, digest(local)]

    def close(self) -> None:
        self.engine.close()


def main() -> None:
    holder = {"target": Target, "reader": Reader, "engine": Engine}[sys.argv[1]](
        **json.loads(sys.stdin.readline())
    )
    print(json.dumps(holder.about()), flush=True)
    for line in sys.stdin:
        method, arguments = json.loads(line)
        print(json.dumps(getattr(holder, method)(**arguments)), flush=True)


if __name__ == "__main__":
    main()
