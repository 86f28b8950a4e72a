"""The C library: loops that move a whole slice without Python in between.

Optional: where it was not built, or is of another version, `library()` says why and the Python twin
of each loop serves. It is plain C, loaded by ctypes, so that one binary fits every Python;
docs/decisions/native-loop.md says what it buys.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import logging
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from mooncake_engine.iovec import address_of
from mooncake_engine.types import Op

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Final

    from mooncake_engine.types import Slice

_log = logging.getLogger(__name__)

ABI: Final = 4  # MOONCAKE_ABI of native.h
_FILE: Final = Path(__file__).with_name("_loops.abi3.so")

_POINTER = ctypes.c_void_p  # takes an address, or bytes
_INT = ctypes.c_int
_U32, _U64, _I64, _SIZE = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int64, ctypes.c_size_t
_TOKEN = (_POINTER, _POINTER, _SIZE)

#: Name without `mooncake_` -> what it returns, what it takes.
_FUNCTIONS: Final[dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "exchange_new": (_POINTER, (_INT,)),
    "exchange_free": (None, (_POINTER,)),
    "exchange_told": (_POINTER, (_POINTER,)),
    "exchange_start": (_INT, (_POINTER, _POINTER)),
    "exchange_go_on": (_INT, (_POINTER,)),
    "streams_new": (_POINTER, (_POINTER, _SIZE)),
    "streams_told": (_POINTER, (_POINTER, _SIZE)),
    "copies_new": (_POINTER, (_POINTER, _SIZE)),
    "team_free": (None, (_POINTER,)),
    "team_run": (_INT, (_POINTER, _POINTER, _U64, _I64, _I64, _POINTER)),
    "team_wait": (_INT, (_POINTER, _I64, _POINTER)),
    "team_stop": (None, (_POINTER,)),
    "team_failed": (_SIZE, (_POINTER,)),
    "merge": (_SIZE, (_POINTER, _POINTER, _POINTER, _SIZE, _POINTER, _POINTER, _POINTER)),
    "regions_new": (_POINTER, ()),
    "regions_free": (None, (_POINTER,)),
    "regions_replace": (None, (_POINTER, _POINTER, _POINTER, _SIZE, _U64, _U64)),
    "grants_new": (_POINTER, ()),
    "grants_free": (None, (_POINTER,)),
    "grants_add": (None, _TOKEN),
    "grants_revoke": (None, _TOKEN),
    "serving_new": (_POINTER, (_INT, *(_POINTER,) * 3, _U64, _U32, _U32)),
    "serving_free": (None, (_POINTER,)),
    "serve": (_INT, (_POINTER,)),
}
#: The same for those that keep the interpreter lock; the others give it up.
_HOLDING: Final = {
    "exchange_hold": (_INT, (_POINTER, _POINTER)),
    "copy": (_INT, (_POINTER, _POINTER)),
    "merge": _FUNCTIONS["merge"],
    "team_run": _FUNCTIONS["team_run"],
}


class Outcome(enum.IntEnum):
    """`enum outcome` of native.h; other negative numbers are -errno."""

    DONE = 0
    AGAIN = 1
    ENDED = 2
    HANDED = 3
    HANDED_BODY = 4
    CUT = 5
    LATE = 6


class Unavailable(Exception):
    """There is no library that this version can use: why, and what to do."""


class Library:
    """The functions, typed, by their names without `mooncake_`.

    Attributes:
        holding: Those that keep the interpreter lock; the others give it up.
    """

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
        self.__dict__.update(_typed(loaded, _FUNCTIONS))
        self.holding = SimpleNamespace(**_typed(ctypes.PyDLL(str(path)), _HOLDING))

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Callable[..., Any]: ...


def _typed(loaded: Any, functions: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:  # noqa: ANN401 - ctypes has no types of its own here
    found = {}
    for name, (result, arguments) in functions.items():
        function = found[name] = getattr(loaded, f"mooncake_{name}")
        function.restype, function.argtypes = result, arguments
    return found


_PACKED = struct.Struct("<8Q")  # struct slice of native.h
_OPS = {Op.READ: 1, Op.WRITE: 2}


def packed(piece: Slice) -> bytes:
    """The slice as C takes it; good for as long as the slice lives, on any number of lanes."""
    found = piece.packed
    if found is None:
        grant = piece.grant
        found = piece.packed = _PACKED.pack(
            _OPS[piece.op],
            piece.local.size,
            piece.nbytes,
            address_of(piece.local),
            address_of(piece.remote),
            address_of(piece.lengths),
            address_of(np.frombuffer(grant, np.uint8)) if grant else 0,
            len(grant),
        )
    return found


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


def available() -> Library | None:
    """The same, where nothing needs to be said when there is none."""
    found = _loaded()
    return None if isinstance(found, Unavailable) else found


def wanted(scheme: str, *, use: bool) -> Library | None:
    """The library for a transport whose setting `native` is `use`, or the log's word on why not."""
    if not use:
        _log.info("%s is moved by Python: %s.native is off", scheme, scheme)
        return None
    try:
        return library()
    except Unavailable as why:
        _log.info("%s is moved by Python, slower beside a busy interpreter: %s", scheme, why)
        return None
