"""The C library of the tcp transport: loops that move a whole slice without Python in between.

Optional: where it was not built, or is of another version, `library()` says why and the Python twin
of each loop serves. It is plain C, loaded by ctypes, so that one binary fits every Python;
docs/decisions/native-loop.md says what it buys.
"""

from __future__ import annotations

import ctypes
import enum
import functools
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Final

ABI: Final = 1  # MOONCAKE_ABI of native.h
_FILE: Final = Path(__file__).with_name("_loops.abi3.so")

_U32 = ctypes.c_uint32
_SIZE = ctypes.c_uint64
_POINTER = ctypes.c_void_p
_BYTES = ctypes.c_char_p
_EXCHANGE = (
    _POINTER,
    *(_BYTES, _BYTES),  # header, expected answer
    *(_BYTES, _BYTES, _BYTES),  # remote, lengths, local
    *(_U32, _SIZE),  # runs, nbytes
    *(_BYTES, _U32),  # grant
    ctypes.c_int,  # is it a write?
)


class Outcome(enum.IntEnum):
    """`enum outcome` of native.h; other negative numbers are -errno."""

    DONE = 0
    AGAIN = 1
    ENDED = 2
    HANDED = 3


class Unavailable(Exception):
    """There is no library that this version can use: why, and what to do."""


class Library:
    """The functions, typed. `hold` keeps the interpreter lock, all others give it up."""

    def __init__(self, path: Path) -> None:
        """Raises `Unavailable`."""
        try:
            loaded = ctypes.CDLL(str(path))
        except OSError as failure:
            raise Unavailable(
                f"the native loops are not built ({failure}); install a C compiler (Debian: gcc "
                "libc6-dev) and install this package again"
            ) from failure
        abi = loaded.mooncake_abi()
        if abi != ABI:
            raise Unavailable(
                f"{path} was built for version {abi} of the native loops and this is {ABI}; "
                "install this package again (pip install -e . in a checkout)"
            )
        self.exchange_new = loaded.mooncake_exchange_new
        self.exchange_new.argtypes = (ctypes.c_int,)
        self.exchange_new.restype = _POINTER
        self.exchange_free = loaded.mooncake_exchange_free
        self.exchange_free.argtypes = (_POINTER,)
        self.exchange_free.restype = None
        self.exchange_answer = loaded.mooncake_exchange_answer
        self.exchange_answer.argtypes = (_POINTER,)
        self.exchange_answer.restype = _POINTER
        self.exchange_start = loaded.mooncake_exchange_start
        self.exchange_start.argtypes = _EXCHANGE
        self.exchange_go_on = loaded.mooncake_exchange_go_on
        self.exchange_go_on.argtypes = (_POINTER,)
        self.exchange_hold = ctypes.PyDLL(str(path)).mooncake_exchange_hold
        self.exchange_hold.argtypes = _EXCHANGE


@functools.cache
def _loaded() -> Library | Unavailable:
    try:
        return Library(_FILE)
    except Unavailable as why:
        return why


def library() -> Library:
    """The one library of this process. Raises `Unavailable`."""
    found = _loaded()
    if isinstance(found, Unavailable):
        raise Unavailable(str(found))
    return found
