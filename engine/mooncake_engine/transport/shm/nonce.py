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
    from mooncake_engine.types import Uint64s

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


class NonceReader:
    """Confirms that `pid` is still the process that published the nonce. One thread at a time."""

    def __init__(self, pid: int, address: int, value: bytes, peer: str) -> None:
        self._pid = pid
        self._value = value
        self._peer = peer
        self._found = ctypes.create_string_buffer(NONCE_BYTES)
        both = np.array([ctypes.addressof(self._found), address], np.uint64)
        self._iovecs = iovecs(both, np.full(2, NONCE_BYTES, np.uint64))
        here = address_of(self._iovecs)
        self._arguments = here, 1, here + IOVEC.itemsize, 1

    def read(self, local: Uint64s, remote: Uint64s, lengths: Uint64s, nbytes: int) -> bool:
        """Read runs of the process, fewer than `IOV_MAX`, and the nonce behind them, in one call.

        False: not all of that came; nothing is known then. Saves 3 us of 25 a small read takes.
        """
        here, there = np.empty(local.size + 1, IOVEC), np.empty(local.size + 1, IOVEC)
        for runs, addresses, nonce in ((here, local, 0), (there, remote, 1)):
            runs["base"][:-1] = addresses
            runs["len"][:-1] = lengths
            runs[-1] = self._iovecs[nonce]
        try:
            moved = process_vm.copy(Op.READ, self._pid, here, there, nbytes)
        except OSError:
            return False
        return moved == nbytes + NONCE_BYTES and self._found.raw == self._value

    def confirm(self) -> None:
        """Raise `LaneError` unless the nonce is there: PEER_GONE, or what the errno means."""
        moved = 0
        try:
            moved = process_vm.read_few(self._pid, *self._arguments)
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
