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


class Call:
    """One call that moves a slice; a read, the nonce behind it too. One thread at a time."""

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
        most = runs if piece.op is Op.READ else runs - 1
        self._arguments = here, most, here + 16 * runs, most, piece.nbytes
        self._nbytes = piece.nbytes

    def read(self, pid: int) -> bytes:
        """Move it all; what was found in the nonce's place, nothing when not all of it came."""
        moved = process_vm.move(Op.READ, pid, *self._arguments)
        return self._found.tobytes() if moved == self._nbytes + NONCE_BYTES else b""

    def write(self, pid: int) -> bool:
        """False: not all of it went."""
        return process_vm.move(Op.WRITE, pid, *self._arguments) == self._nbytes


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

    def move(self, piece: Slice) -> bool:
        """Move a slice, of fewer than `IOV_MAX` runs, in one call that is confirmed.

        False: not all of that was moved, and nothing is known. A read brings the nonce along,
        which saves 3 us; a write has it read before, and after as each call has.

        Raises `LaneError` as `confirm`.
        """
        try:
            spare = piece.spare.pop() if piece.spare else None
        except IndexError:  # another lane took it between the two
            spare = None
        call = spare if isinstance(spare, Call) else Call(piece, self._address)
        try:
            if piece.op is Op.READ:
                done = call.read(self._pid) == self._value
            else:
                self.confirm()
                done = call.write(self._pid)
        except OSError:
            return False
        if done and piece.op is Op.WRITE:
            self.confirm()
        piece.spare.append(call)
        return done

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
