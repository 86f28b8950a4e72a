"""Copying between this process and another of the same machine: process_vm_readv and -writev.

One system call moves up to 1024 runs, one copy, without the other process waking up and without
the interpreter lock. The kernel asks for the right to ptrace the other process.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mooncake_engine.errors import LaneError
from mooncake_engine.iovec import IOV_MAX, address_of, iovecs, libc
from mooncake_engine.types import Op, Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from mooncake_engine.iovec import Iovecs
    from mooncake_engine.types import Uint64s

CALL_BYTES = 32 << 20  # of one system call: 7 ms, after which an interrupt is looked at

# A call by CDLL gives the interpreter lock back and then waits up to 5 ms for it: beside a thread
# that runs Python 2048 x 128 KiB in one memmove each took 3.3 s, and 43 ms with the lock held. So
# what takes no longer than Python code would keep it anyway is called by PyDLL.
_HELD_BYTES = 256 << 10  # 60 us
_MAPPED_HELD_BYTES = 1 << 20  # of one memmove, about 0.1 ms
_holding = ctypes.PyDLL(None, use_errno=True)
_memmove_holding = _holding.memmove
_memmove_holding.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_memmove_holding.restype = ctypes.c_void_p

_PR_SET_PTRACER = 0x59616D61  # "Yama", from linux/prctl.h
_PR_SET_PTRACER_ANY = ctypes.c_ulong(-1).value

_CALLS = {Op.READ: libc.process_vm_readv, Op.WRITE: libc.process_vm_writev}
_CALLS_HOLDING = {Op.READ: _holding.process_vm_readv, Op.WRITE: _holding.process_vm_writev}

for _call in (*_CALLS.values(), *_CALLS_HOLDING.values()):
    _call.argtypes = (
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_ulong,
        ctypes.c_void_p,
        ctypes.c_ulong,
        ctypes.c_ulong,
    )
    _call.restype = ctypes.c_ssize_t
libc.prctl.argtypes = (ctypes.c_int, *(ctypes.c_ulong,) * 4)
libc.prctl.restype = ctypes.c_int

#: What an errno of process_vm_* means for a slice, and what to say of it. EFAULT also comes
#: when the local side is wrong: who handles one asks `readable` first.
REASONS: dict[int, tuple[Status, str]] = {
    errno.ESRCH: (
        Status.PEER_GONE,
        "no such process: it has ended, or it lives in another pid namespace",
    ),
    errno.EPERM: (
        Status.REFUSED,
        "the kernel does not let this process touch that one's memory; run both as the same user, "
        "leave shm.allow_any_reader on at the peer where kernel.yama.ptrace_scope is 1 (2 and 3 "
        "forbid it), and in a container add CAP_SYS_PTRACE or a seccomp profile that permits "
        "process_vm_readv",
    ),
    errno.EFAULT: (
        Status.REFUSED,
        "that process has no such memory; keep registered memory mapped until it is unregistered",
    ),
    errno.ENOMEM: (Status.FAILED, "the kernel is short of memory"),
    errno.ENOSYS: (
        Status.FAILED,
        "this kernel or its seccomp profile has no process_vm_readv; permit it, or use tcp",
    ),
}


def permit_any_reader() -> None:
    """Where Yama's ptrace_scope is 1, let any process of this user read this one.

    Naming one reader would forget the last one, so it is all or none. The setting belongs to the
    process and is not taken back: a debugger or crash handler may count on it too. Without
    Yama the call fails with EINVAL, and there is nothing to permit.
    """
    libc.prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY, 0, 0, 0)


def copy(op: Op, pid: int, local: Iovecs, remote: Iovecs, nbytes: int) -> int:
    """One system call; returns the bytes moved, at least 1 and perhaps fewer than asked for.

    `local` and `remote` have the same total, `nbytes` or less, and at most `IOV_MAX` runs each.
    Raises `OSError`.
    """
    return move(op, pid, address_of(local), local.size, address_of(remote), remote.size, nbytes)


def move(op: Op, pid: int, local: int, locals_: int, remote: int, remotes: int, nbytes: int) -> int:
    """`copy`, by the addresses and sizes of the arrays."""
    calls = _CALLS_HOLDING if nbytes <= _HELD_BYTES else _CALLS
    return _call_until_moved(calls[op], pid, local, locals_, remote, remotes)


def _call_until_moved(
    function: Callable[..., int], pid: int, local: int, locals_: int, remote: int, remotes: int
) -> int:
    while (moved := function(pid, local, locals_, remote, remotes, 0)) <= 0:
        # Nothing moved and no errno: the kernel does not do that, and a loop must not spin on it.
        code = ctypes.get_errno() if moved < 0 else errno.EFAULT
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return moved


def explain(error: OSError, what: str) -> LaneError:
    """`error` of `copy` as the end of a slice; `what` was attempted, on what and with whom."""
    status, reason = REASONS.get(error.errno or 0, (Status.FAILED, str(error)))
    if error.errno == errno.EPERM:
        reason += f" (kernel.yama.ptrace_scope here: {ptrace_scope()})"
    return LaneError(status, f"{what} failed: {reason}")


def ptrace_scope() -> str:
    """Yama's setting, or "no Yama"."""
    try:
        return Path("/proc/sys/kernel/yama/ptrace_scope").read_text(encoding="ascii").strip()
    except OSError:
        return "no Yama"


def readable(pid: int, address: int) -> bool:
    """Can one byte be read at `address` of `pid`? Tells which side an EFAULT is about."""
    byte = np.empty(1, np.uint8)
    one = np.ones(1, np.uint64)
    here = iovecs(np.array([address_of(byte)], np.uint64), one)
    there = iovecs(np.array([address], np.uint64), one)
    try:
        copy(Op.READ, pid, here, there, 1)
    except OSError:
        return False
    return True


def usable() -> bool:
    """May we make these calls at all? On ourselves only a seccomp profile can forbid them."""
    byte = np.zeros(1, np.uint8)
    return readable(os.getpid(), address_of(byte))


def copy_mapped(op: Op, local: Iovecs, remote: Iovecs) -> int:
    """What `copy` does, for memory that this process has mapped and without process_vm calls.

    For containers whose seccomp profile forbids those. Unmapped memory is a SIGSEGV.
    """
    into, out = (local, remote) if op is Op.READ else (remote, local)
    lengths = local["len"].tolist()
    for target, source, length in zip(
        into["base"].tolist(), out["base"].tolist(), lengths, strict=True
    ):
        (_memmove_holding if length <= _MAPPED_HELD_BYTES else ctypes.memmove)(
            target, source, length
        )
    return sum(lengths)


class Runs:
    """The runs of one slice, entered at any byte, so that partial counts need no bookkeeping."""

    def __init__(self, local: Uint64s, remote: Uint64s, lengths: Uint64s, nbytes: int) -> None:
        """Args: nbytes: total of `lengths`."""
        self._local = local
        self._remote = remote
        self._lengths = lengths
        self.nbytes = nbytes

    @functools.cached_property
    def _ends(self) -> Uint64s:
        return np.cumsum(self._lengths, dtype=np.uint64)

    def window(self, done: int) -> tuple[Iovecs, Iovecs]:
        """(local, remote) of the next call: `IOV_MAX` runs and `CALL_BYTES` at most."""
        if not done and self._lengths.size <= IOV_MAX and self.nbytes <= CALL_BYTES:
            return iovecs(self._local, self._lengths), iovecs(self._remote, self._lengths)
        ends = self._ends
        budget = done + CALL_BYTES
        first = int(np.searchsorted(ends, np.uint64(done), side="right"))
        last = min(
            int(np.searchsorted(ends, np.uint64(budget))), first + IOV_MAX - 1, ends.size - 1
        )
        skipped = np.uint64(done - (int(ends[first - 1]) if first else 0))
        excess = np.uint64(max(0, int(ends[last]) - budget))
        part = slice(first, last + 1)
        sides = (
            iovecs(self._local[part], self._lengths[part]),
            iovecs(self._remote[part], self._lengths[part]),
        )
        for side in sides:
            side["base"][0] += skipped
            side["len"][0] -= skipped
            side["len"][-1] -= excess
        return sides

    def at(self, done: int) -> tuple[int, int]:
        """(local, remote) address of byte number `done`."""
        run = int(np.searchsorted(self._ends, np.uint64(done), side="right"))
        offset = done - (int(self._ends[run - 1]) if run else 0)
        return int(self._local[run]) + offset, int(self._remote[run]) + offset
