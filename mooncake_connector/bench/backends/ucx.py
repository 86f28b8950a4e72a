"""UCX by itself, from the wheel `libucx-cu12`: ucp_get and ucp_put of a whole list, then a flush.

It is what NIXL's backend calls, measured without NIXL, by a hundred lines of C that are built on
demand (`bench/native/ucx`). Over TCP UCX emulates both in software, on the same host it takes
`cma`. The target's thread spins, as NIXL's does, or sleeps until UCX wakes it.
"""

from __future__ import annotations

import base64
import ctypes
import functools
import importlib.util
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from typing_extensions import override

from mooncake_connector.bench import base, compiled
from mooncake_connector.bench.base import BackendFailed, Route, Variant
from mooncake_connector.bench.limits import address_of
from mooncake_connector.bench.runs import merged

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from mooncake_connector.bench.base import Transfer

_ENVIRONMENT = {Route.TCP: {"UCX_TLS": "tcp"}, Route.SAME_HOST: {}}
_LABEL = {Route.TCP: "tcp", Route.SAME_HOST: "cma"}
_SOURCES = compiled.SOURCES / "ucx"


def missing() -> str:
    """Why UCX cannot run here; empty when it can."""
    if not importlib.util.find_spec("libucx"):
        return "UCX is not installed: pip install libucx-cu12"
    return "" if compiled.compiler() else "UCX is called by C: install a compiler (apt install gcc)"


def variants(route: Route) -> tuple[Variant, ...]:
    """A target that spins, with descriptors as given and merged, and one that sleeps."""
    if route not in _ENVIRONMENT:
        return ()
    return tuple(
        Variant(
            backend="ucx",
            name=f"UCX {_LABEL[route]}{words}",
            route=route,
            options=options,
            environment=_ENVIRONMENT[route] | {"UCX_LOG_LEVEL": "error"},
        )
        for words, options in (
            ("", {}),
            (", runs merged", {"merge": "yes"}),
            (", target sleeps", {"sleeps": "yes"}),
        )
    )


@functools.cache
def _library() -> ctypes.CDLL:
    package = importlib.util.find_spec("libucx")
    if package is None or package.origin is None:
        raise BackendFailed(missing())
    wheel = Path(package.origin).parent
    libraries = wheel / "lib"
    flags = (f"-I{wheel / 'include'}", f"-L{libraries}", f"-Wl,-rpath,{libraries}")
    built = compiled.built("ucx", sorted(_SOURCES.glob("*.c")), flags, ("-lucp", "-lucs"))
    library = ctypes.CDLL(str(built))
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    for name, result, arguments in (
        ("side_open", pointer, (pointer, size, number, pointer)),
        ("side_blob", pointer, (pointer, number, pointer)),
        ("side_connect", number, (pointer, ctypes.c_char_p, ctypes.c_char_p)),
        ("side_move", number, (pointer, number, size, pointer, pointer, pointer, pointer)),
        ("side_serve", number, (pointer, number)),
        ("side_end", None, (pointer, number)),
        ("side_close", None, (pointer,)),
        ("side_text", ctypes.c_char_p, (number,)),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _ensure(status: int, what: str) -> None:
    if status:
        text = _library().side_text(status).decode()
        raise BackendFailed(f"UCX could not {what}: {text}; UCX_LOG_LEVEL=info tells more")


class _Side:
    """One context and its memory."""

    def __init__(self, memory: NDArray[np.uint8], options: Mapping[str, str]) -> None:
        self._memory, self._options = memory, options
        self._sleeps = int("sleeps" in options)
        self._base = address_of(memory)
        status = ctypes.c_int()
        self._library = _library()
        self._side: int | None = self._library.side_open(
            self._base, memory.nbytes, self._sleeps, ctypes.byref(status)
        )
        _ensure(status.value, f"start and register {memory.nbytes} bytes")

    def close(self) -> None:
        side, self._side = self._side, None
        if side is not None:
            self._library.side_close(side)


class Target(_Side, base.Target):
    """Serves on a thread that is in C from its start to its end."""

    def __init__(self, memory: NDArray[np.uint8], options: Mapping[str, str]) -> None:
        super().__init__(memory, options)
        self._thread = threading.Thread(
            target=self._library.side_serve, args=(self._side, self._sleeps), daemon=True
        )
        self._thread.start()

    @override
    def address(self) -> dict[str, str]:
        worker, key = (self._blob(which) for which in (0, 1))
        return {"worker": worker, "key": key, "memory": str(self._base)}

    def _blob(self, which: int) -> str:
        size = ctypes.c_size_t()
        at = self._library.side_blob(self._side, which, ctypes.byref(size))
        return base64.b64encode(ctypes.string_at(at, size.value)).decode()

    @override
    def close(self) -> None:
        if self._side is not None:
            self._library.side_end(self._side, self._sleeps)
            self._thread.join()
        super().close()


class Initiator(_Side, base.Initiator):
    """One endpoint, polled by whoever waits; threads take turns."""

    @override
    def connect(self, address: Mapping[str, str]) -> None:
        self._blobs = tuple(base64.b64decode(address[name]) for name in ("worker", "key"))
        _ensure(self._library.side_connect(self._side, *self._blobs), "connect to the target")
        self._remote = int(address["memory"])
        self._lock = threading.Lock()  # a worker belongs to one thread at a time

    @override
    def prepare(self, transfer: Transfer) -> Callable[[], None]:
        if "merge" in self._options:
            transfer = merged(transfer)
        count = transfer.lengths.size
        lists: list[NDArray[Any]] = [
            transfer.local + np.uint64(self._base),
            transfer.remote + np.uint64(self._remote),
            transfer.lengths.copy(),
            np.empty(count, np.uint64),  # UCX's requests
        ]
        pointers = [address_of(each) for each in lists]
        move, side, write = self._library.side_move, self._side, int(transfer.op == "write")

        def run() -> None:
            with self._lock:
                status = move(side, write, count, *pointers)
            if status:
                _ensure(status, f"{transfer.op} {transfer.nbytes} bytes in {lists[0].size} pieces")

        return run
