"""Whose memory is this? A random nonce in the target's memory, read before anything is believed.

A pid alone says little: it may be given away after the target's death, and mean another process
in another pid namespace.
"""

from __future__ import annotations

import ctypes
import errno
import os

import numpy as np

from mooncake_engine.errors import LaneError
from mooncake_engine.iovec import IOVEC, address_of, iovecs
from mooncake_engine.transport.shm import process_vm
from mooncake_engine.transport.shm.copier import Owner
from mooncake_engine.types import Op, Status

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
        self.pid = pid
        self._address = address
        self._value = value
        self._peer = peer
        self._found = ctypes.create_string_buffer(NONCE_BYTES)
        both = np.array([ctypes.addressof(self._found), address], np.uint64)
        self._iovecs = iovecs(both, np.full(2, NONCE_BYTES, np.uint64))
        here = address_of(self._iovecs)
        self._arguments = here, 1, here + IOVEC.itemsize, 1

    @property
    def owner(self) -> Owner:
        """Who it is, as C takes it."""
        return Owner(self.pid, self._address, self._value)

    def another(self) -> NonceReader:
        """The same for another thread."""
        return NonceReader(self.pid, self._address, self._value, self._peer)

    def confirm(self) -> None:
        """Raise `LaneError` unless the nonce is there: PEER_GONE, or what the errno means."""
        moved = 0
        try:
            moved = process_vm.move(Op.READ, self.pid, *self._arguments, NONCE_BYTES)
        except OSError as error:
            if error.errno != errno.EFAULT:
                raise process_vm.explain(
                    error, f"finding {self._peer} in process {self.pid}"
                ) from error
        if moved != NONCE_BYTES or self._found.raw != self._value:
            raise LaneError(
                Status.PEER_GONE,
                f"process {self.pid} is not the one that published itself as {self._peer}: it "
                "has closed its engine, has ended and its pid was given away, or lives in "
                "another pid namespace",
            )
