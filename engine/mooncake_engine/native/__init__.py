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
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final

ABI: Final = 3  # MOONCAKE_ABI of native.h
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

_REPLACE = (_POINTER, _BYTES, _BYTES, ctypes.c_size_t, _SIZE, _SIZE)
_TOKEN = (_POINTER, _BYTES, ctypes.c_size_t)
_SERVING = (ctypes.c_int, _POINTER, _POINTER, _POINTER, _POINTER, _SIZE, _U32, _U32)


class Outcome(enum.IntEnum):
    """`enum outcome` of native.h; other negative numbers are -errno."""

    DONE = 0
    AGAIN = 1
    ENDED = 2
    HANDED = 3
    HANDED_BODY = 4
    CUT = 5


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
        free = (_POINTER,)
        self.exchange_new = _typed(loaded.mooncake_exchange_new, _POINTER, ctypes.c_int)
        self.exchange_free = _typed(loaded.mooncake_exchange_free, None, *free)
        self.exchange_answer = _typed(loaded.mooncake_exchange_answer, _POINTER, _POINTER)
        self.exchange_start = _typed(loaded.mooncake_exchange_start, ctypes.c_int, *_EXCHANGE)
        self.exchange_go_on = _typed(loaded.mooncake_exchange_go_on, ctypes.c_int, _POINTER)
        holding = ctypes.PyDLL(str(path))
        self.exchange_hold = _typed(holding.mooncake_exchange_hold, ctypes.c_int, *_EXCHANGE)
        self.regions_new = _typed(loaded.mooncake_regions_new, _POINTER)
        self.regions_free = _typed(loaded.mooncake_regions_free, None, *free)
        self.regions_replace = _typed(loaded.mooncake_regions_replace, None, *_REPLACE)
        self.grants_new = _typed(loaded.mooncake_grants_new, _POINTER)
        self.grants_free = _typed(loaded.mooncake_grants_free, None, *free)
        self.grants_add = _typed(loaded.mooncake_grants_add, None, *_TOKEN)
        self.grants_revoke = _typed(loaded.mooncake_grants_revoke, None, *_TOKEN)
        self.serving_new = _typed(loaded.mooncake_serving_new, _POINTER, *_SERVING)
        self.serving_free = _typed(loaded.mooncake_serving_free, None, *free)
        self.serve = _typed(loaded.mooncake_serve, ctypes.c_int, _POINTER)


def _typed(function: Any, result: Any, *arguments: Any) -> Callable[..., Any]:  # noqa: ANN401 - ctypes has no types of its own here
    function.restype = result
    function.argtypes = arguments
    return cast("Callable[..., Any]", function)


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
