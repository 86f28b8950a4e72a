"""The limit of same-host transfers: memcpy between mappings of the same pages, by 1 or 2 threads.

The target puts a memfd under its memory, the initiator maps the same, and each of its threads
copies its share of the list, piece by piece, in C. No byte crosses the kernel and nobody is asked
or told: an engine has all that on top. "process_vm" is the same list by process_vm_readv and
-writev, 1024 runs a call: what a copy through the kernel can do, shown beside the limit.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import TYPE_CHECKING

import numpy as np
from mooncake_engine.errors import EngineError
from mooncake_engine.transport.shm.arena import memory_file
from mooncake_engine.transport.shm.shared_pages import STEP, move_into_file
from typing_extensions import override

from mooncake_connector.bench import base, compiled
from mooncake_connector.bench.base import BackendFailed, Route, Transfer, Variant
from mooncake_connector.bench.limits import (
    PreparedRuns,
    address_of,
    check_bounds,
    iovecs,
    split,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    Uint64s = NDArray[np.uint64]

missing = compiled.missing

_PR_SET_PTRACER = 0x59616D61  # "Yama", from linux/prctl.h
_PR_SET_PTRACER_ANY = ctypes.c_ulong(-1).value


def variants(route: Route) -> tuple[Variant, ...]:
    """Copies by one thread and by two, and the same through the kernel."""
    if route is not Route.SAME_HOST:
        return ()
    return tuple(
        Variant(
            backend="memcpy",
            name=f"{method} in C, {threads} thread{'s' if threads > 1 else ''}",
            route=route,
            options={"method": method, "threads": str(threads)},
            is_limit=method == "memcpy",
        )
        for method, threads in (("memcpy", 1), ("memcpy", 2), ("process_vm", 2))
    )


class _Copies(ctypes.Structure):
    """`struct copies` of copies.c."""

    _fields_ = (
        ("to", ctypes.c_void_p),
        ("from_", ctypes.c_void_p),
        ("count", ctypes.c_size_t),
        ("pid", ctypes.c_int32),
        ("write", ctypes.c_int32),
    )


class Target(base.Target):
    """Memory that another process can reach; nothing runs here."""

    def __init__(self, memory: NDArray[np.uint8], options: Mapping[str, str]) -> None:
        """Where the method is memcpy the pages become those of a memfd, their bytes kept."""
        self._memory = memory
        self._fd = -1
        if options["method"] == "memcpy":
            self._fd = _share(memory)
        else:  # where Yama's ptrace_scope is 1; elsewhere it fails and nothing needs permitting
            ctypes.CDLL(None).prctl(_PR_SET_PTRACER, ctypes.c_ulong(_PR_SET_PTRACER_ANY), 0, 0, 0)

    @override
    def address(self) -> dict[str, str]:
        return {
            "pid": str(os.getpid()),
            "fd": str(self._fd),
            "base": str(address_of(self._memory)),
            "size": str(self._memory.size),
        }

    @override
    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


class Initiator(base.Initiator):
    """Copies, with threads of its own."""

    def __init__(self, memory: NDArray[np.uint8], options: Mapping[str, str]) -> None:
        """Args: options: "method" (memcpy or process_vm) and "threads"."""
        self._memory = memory
        self._method = options["method"]
        self._threads = int(options["threads"])
        self._pid = self._base = self._size = 0
        self._mapping: NDArray[np.uint8] | None = None

    @override
    def connect(self, address: Mapping[str, str]) -> None:
        self._size, pid = int(address["size"]), int(address["pid"])
        if self._method != "memcpy":
            self._pid, self._base = pid, int(address["base"])
            return
        path = f"/proc/{pid}/fd/{address['fd']}"
        try:
            fd = os.open(path, os.O_RDWR)
            try:
                mapping = mmap.mmap(fd, self._size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
            finally:
                os.close(fd)
        except OSError as failure:
            raise BackendFailed(
                f"cannot map the target's memory by {path}: {failure}; run both sides on one "
                "machine, in one pid namespace and as one user"
            ) from failure
        self._mapping = np.frombuffer(mapping, np.uint8)
        self._base = address_of(self._mapping)

    @override
    def prepare(self, transfer: Transfer) -> PreparedRuns:
        check_bounds(transfer.local, transfer.lengths, self._memory.size, "initiator")
        check_bounds(transfer.remote, transfer.lengths, self._size, "target")
        kept: list[NDArray[np.void]] = []
        parts = [self._part(part, kept) for part in split(transfer, self._threads)]

        def describe(error: OSError) -> str:
            return (
                f"{self._method} of {transfer.nbytes} bytes, process {self._pid or 'mapped'}: "
                f"{error}; does the target live, and may this user trace it?"
            )

        mapping = self._mapping
        # The lists and the mapping live as long as the threads that use them.
        return PreparedRuns(f"limits_{self._method}", parts, describe, lambda: _keep(kept, mapping))

    def _part(self, part: Transfer, kept: list[NDArray[np.void]]) -> _Copies:
        local = part.local + np.uint64(address_of(self._memory))
        remote = part.remote + np.uint64(self._base)
        both = np.flatnonzero(
            np.append(
                True,
                (local[1:] != local[:-1] + part.lengths[:-1])
                | (remote[1:] != remote[:-1] + part.lengths[:-1]),
            )
        )
        lengths = np.add.reduceat(part.lengths, both)
        write = part.op == "write"
        ours, theirs = iovecs(local[both], lengths), iovecs(remote[both], lengths)
        to, source = (theirs, ours) if write else (ours, theirs)
        kept += (to, source)
        return _Copies(address_of(to), address_of(source), lengths.size, self._pid, write)

    @override
    def close(self) -> None:
        self._mapping = None


def _keep(*_: object) -> None:
    """Does nothing; who refers to it with arguments keeps those alive."""


def _share(memory: NDArray[np.uint8]) -> int:
    """Put a memfd under `memory`, step by step, and return its descriptor."""
    start, size = address_of(memory), memory.size
    if start % mmap.PAGESIZE or size % mmap.PAGESIZE:
        raise BackendFailed(
            f"cannot share {size} bytes at {start:#x}: give whole pages of {mmap.PAGESIZE} bytes"
        )
    fd = -1
    try:
        fd = memory_file(size)
        for at in range(0, size, STEP):
            move_into_file(start + at, min(STEP, size - at), fd, at)
    except (EngineError, OSError) as failure:
        if fd >= 0:
            os.close(fd)
        raise BackendFailed(f"cannot share {size} bytes at {start:#x}: {failure}") from failure
    return fd
