"""Copies made by loops in C (copies.c). What fails in them is Python's to explain."""

from __future__ import annotations

import ctypes
import struct
from typing import TYPE_CHECKING, NamedTuple

from mooncake_engine.iovec import IOV_MAX
from mooncake_engine.native import packed
from mooncake_engine.native.team import Team

if TYPE_CHECKING:
    from mooncake_engine.native import Library
    from mooncake_engine.types import Slice

#: Of one call that keeps the interpreter lock: 60 us of copying. To give the lock up costs 5 ms
#: beside a thread that runs Python.
_HELD_BYTES = 256 << 10
_PIECE_BYTES = 64 << 10, 2 << 20  # 2 MiB take 0.5 ms, after which an interrupt is looked at
_OWNER = struct.Struct("<qQ32s2i8x")  # struct owner of copies.c


class Owner(NamedTuple):
    """Whose memory it is: a process and its nonce, or the descriptors that tell of its life."""

    pid: int = 0  # 0: its memory is mapped here
    nonce_address: int = 0
    nonce: bytes = b""
    alive: tuple[int, int] = (-1, -1)


class Copier:
    """Copies between the memory of one owner and ours. Any number of threads at a time."""

    def __init__(self, library: Library, owner: Owner) -> None:
        self._library = library
        self._copy = library.holding.copy
        memory = _OWNER.pack(*owner[:3], *owner.alive)
        self._memory = ctypes.create_string_buffer(memory, len(memory))  # C notes something in it
        self._owner = ctypes.addressof(self._memory)

    def at_once(self, piece: Slice) -> bool:
        """Move a small slice of a process. False: it is not small, or nothing is known of it."""
        small = piece.nbytes <= _HELD_BYTES and piece.local.size <= IOV_MAX
        return small and not self._copy(self._owner, packed(piece))

    def team(self, threads: int) -> Team:
        """For slices of any size, one at a time; with these threads, the caller's among them."""
        made = self._library.copies_new(self._owner, threads)
        return Team(self._library, made, threads, _PIECE_BYTES, self._nobody_waits)

    def _nobody_waits(self) -> None:
        """For an interrupt. The team keeps it, and so the memory that C looks at."""
