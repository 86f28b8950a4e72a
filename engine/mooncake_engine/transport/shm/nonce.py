"""Whose memory is this? A random nonce in the target's memory, read before anything is believed.

A pid alone says little: it may be given away after the target's death, and mean another process
in another pid namespace.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import TYPE_CHECKING

import numpy as np

from mooncake_engine.errors import LaneError
from mooncake_engine.iovec import IOVEC, address_of, iovecs
from mooncake_engine.transport.shm import process_vm
from mooncake_engine.types import Op, Status

if TYPE_CHECKING:
    from mooncake_engine.types import Slice

NONCE_BYTES = 32


class Nonce:
    """Random bytes at a fixed address: who reads them there has found this very process.

    `close` wipes them, so that a reader that comes too late finds out.
    """

    def __init__(self) -> None:
        self.value = os.urandom(NONCE_BYTES)
        self._memory = ctypes.create_string_buffer(self.value, NONCE_BYTES)
        self.address = ctypes.addressof(self._memory)

    def close(self) -> None:
        """Stop being found. Idempotent."""
        ctypes.memset(self.address, 0, NONCE_BYTES)


class Reading:
    """One call that reads a slice's runs and a nonce behind them. One thread at a time."""

    def __init__(self, piece: Slice, nonce_address: int) -> None:
        """Args: piece: of fewer than `IOV_MAX` runs; nonce_address: in the other process."""
        runs = piece.local.size + 1
        # iovecs here, iovecs there, what is found; in one piece, as each object costs 0.5 us.
        self._memory = np.empty(4 * runs + NONCE_BYTES // 8, np.uint64)
        table, last, end = self._memory, 2 * runs - 2, 4 * runs - 2
        table[0:last:2] = piece.local
        table[1:last:2] = table[last + 3 : end : 2] = piece.lengths
        table[last + 2 : end : 2] = piece.remote
        here = address_of(table)
        table[last], table[last + 1] = here + 32 * runs, NONCE_BYTES
        table[end], table[end + 1] = nonce_address, NONCE_BYTES
        self._found = table[4 * runs :]
        self._arguments = here, runs, here + 16 * runs, runs, piece.nbytes
        self._nbytes = piece.nbytes + NONCE_BYTES

    def read(self, pid: int) -> bytes:
        """Move it all; what was found in the nonce's place. `OSError`: not all of it came."""
        if process_vm.move(Op.READ, pid, *self._arguments) != self._nbytes:
            raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
        return self._found.tobytes()


class NonceReader:
    """Confirms that `pid` is still the process that published the nonce. One thread at a time."""

    def __init__(self, pid: int, address: int, value: bytes, peer: str) -> None:
        self._pid = pid
        self._address = address
        self._value = value
        self._peer = peer
        self._found = ctypes.create_string_buffer(NONCE_BYTES)
        both = np.array([ctypes.addressof(self._found), address], np.uint64)
        self._iovecs = iovecs(both, np.full(2, NONCE_BYTES, np.uint64))
        here = address_of(self._iovecs)
        self._arguments = here, 1, here + IOVEC.itemsize, 1

    def read(self, piece: Slice) -> bool:
        """Read a slice, of fewer than `IOV_MAX` runs, and the nonce behind it, in one call.

        False: not all of that came; nothing is known then. Saves 3 us of those a small read takes.
        """
        spare = piece.spare.pop() if piece.spare else None
        reading = spare if isinstance(spare, Reading) else Reading(piece, self._address)
        try:
            found = reading.read(self._pid)
        except OSError:
            return False
        piece.spare.append(reading)
        return found == self._value

    def confirm(self) -> None:
        """Raise `LaneError` unless the nonce is there: PEER_GONE, or what the errno means."""
        moved = 0
        try:
            moved = process_vm.move(Op.READ, self._pid, *self._arguments, NONCE_BYTES)
        except OSError as error:
            if error.errno != errno.EFAULT:
                raise process_vm.explain(
                    error, f"finding {self._peer} in process {self._pid}"
                ) from error
        if moved != NONCE_BYTES or self._found.raw != self._value:
            raise LaneError(
                Status.PEER_GONE,
                f"process {self._pid} is not the one that published itself as {self._peer}: it "
                "has closed its engine, has ended and its pid was given away, or lives in "
                "another pid namespace",
            )
