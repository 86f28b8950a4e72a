"""Memory that somebody else allocated, with a memfd put under it so that peers here can map it.

A copy between mappings costs the kernel nothing; process_vm calls find and pin each page anew,
which takes a quarter of the time. The bytes stay, at their addresses; whoever wrote to them while
the pages are exchanged, or had a device pin them before, would lose what it wrote.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

from mooncake_engine.errors import EngineError
from mooncake_engine.iovec import libc
from mooncake_engine.transport.shm.arena import available_bytes, memory_file

STEP = 64 << 20  # exchanged at once: so much memory is taken twice for a moment
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_MAP_FIXED = 0x10
_PUNCH_HOLE = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE

libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (
    *(ctypes.c_void_p, ctypes.c_size_t),
    *(ctypes.c_int,) * 3,
    ctypes.c_long,
)
libc.fallocate.argtypes = (*(ctypes.c_int,) * 2, *(ctypes.c_long,) * 2)


class SharedPages:
    """The whole pages of a region; what lies before and behind them stays as it is."""

    def __init__(self, address: int, length: int) -> None:
        """Exchange the pages. Takes the memory of all of them, also of those never touched.

        Raises:
            EngineError: They are not plain memory of this process alone, or memory is short.
        """
        self.address = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
        self.length = (address + length) // mmap.PAGESIZE * mmap.PAGESIZE - self.address
        if self.length <= 0:
            raise EngineError("it holds no whole page")
        if strange := _others(self.address, self.length, "rw-p", 0):
            raise EngineError(f"it is not plain memory of this process alone ({strange})")
        self.fd = memory_file(self.length)
        self._exchanged = 0
        try:
            while self._exchanged < self.length:
                self._exchange(min(STEP, self.length - self._exchanged))
        except BaseException:
            self.close()
            raise

    def _exchange(self, size: int) -> None:
        """One step more."""
        if size > (free := available_bytes()):
            raise EngineError(f"this machine has {free} bytes of memory left")
        at = self._exchanged
        move_into_file(self.address + at, size, self.fd, at)
        self._exchanged += size

    def close(self) -> None:
        """Give the process pages of its own again, with the bytes. Idempotent.

        Only where the memfd still is: whoever freed the memory too soon finds other memory there.
        """
        if self.fd < 0:
            return
        try:
            if not _others(self.address, self._exchanged, "rw-s", os.fstat(self.fd).st_ino):
                for at in range(0, self._exchanged, STEP):
                    self._give_back(at, min(STEP, self._exchanged - at))
        finally:
            os.close(self.fd)
            self.fd = -1

    def _give_back(self, at: int, size: int) -> None:
        kept = os.pread(self.fd, size, at)
        _all(len(kept), size)
        _put(self.address + at, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        ctypes.memmove(self.address + at, kept, size)
        libc.fallocate(self.fd, _PUNCH_HOLE, at, size)  # a peer may map it for a while


def move_into_file(address: int, size: int, fd: int, offset: int) -> None:
    """Whole pages become those of a memfd, their bytes kept. Raises `OSError`, `EngineError`."""
    bytes_there = (ctypes.c_char * size).from_address(address)
    _all(os.pwrite(fd, bytes_there, offset), size)
    _put(address, size, mmap.MAP_SHARED | mmap.MAP_POPULATE, fd, offset)


def _others(start: int, length: int, permissions: str, inode: int) -> str:
    """What lies in this range that is not a mapping of that kind; empty: nothing."""
    end = start + length
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        span, found, _, _, number, *name = line.split(maxsplit=5)
        low, high = (int(bound, 16) for bound in span.split("-"))
        if high <= start:
            continue
        if start >= end:
            break
        if low > start:
            return "nothing is mapped there"
        if (found, int(number)) != (permissions, inode):
            return " ".join([found, *name])
        start = high
    return "" if start >= end else "nothing is mapped there"


def _put(address: int, size: int, kind: int, fd: int, offset: int) -> None:
    """Other pages at this very address."""
    if libc.mmap(address, size, _READ_WRITE, kind | _MAP_FIXED, fd, offset) != address:
        code = ctypes.get_errno()
        raise EngineError(f"mmap of {size} bytes at {address:#x}: {os.strerror(code)}")


def _all(moved: int, size: int) -> None:
    if moved != size:
        raise EngineError(f"{moved} of {size} bytes were copied")
