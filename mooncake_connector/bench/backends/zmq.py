"""ZeroMQ from the wheel `pyzmq`: a message for each run, sent without a copy where it has no copy.

ZeroMQ has no read and write: the target serves a thread for each of the initiator's, which knows
the list from `prepare`, sends what a read asks for and receives what a write brings. A received
message is copied once, from ZeroMQ's memory to its place.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import threading
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from typing_extensions import override

from mooncake_connector.bench import base
from mooncake_connector.bench.base import BackendFailed, Route, Variant
from mooncake_connector.bench.runs import merged

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from mooncake_connector.bench.base import Transfer

LIMIT_MS = 60_000  # a run of the largest workload takes under a second


class _List(msgspec.Struct):
    """What one thread of the initiator moves: the target's part of it."""

    op: str
    offsets: bytes
    lengths: bytes


def missing() -> str:
    """Why ZeroMQ cannot run here; empty when it can."""
    return "" if importlib.util.find_spec("zmq") else "ZeroMQ is not installed: pip install pyzmq"


def variants(route: Route) -> tuple[Variant, ...]:
    """A message for each descriptor, and for each run of them; over TCP or a Unix socket."""
    words = {Route.TCP: "tcp", Route.SAME_HOST: "ipc"}.get(route)
    if words is None:
        return ()
    return tuple(
        Variant(
            backend="zmq",
            name=f"ZeroMQ {words}{', runs merged' if merge else ''}",
            route=route,
            options={"scheme": words} | ({"merge": "yes"} if merge else {}),
        )
        for merge in (False, True)
    )


class _Side:
    """A context; its sockets give up after `LIMIT_MS` and leave nothing behind."""

    def __init__(self, memory: NDArray[np.uint8], options: Mapping[str, str]) -> None:
        self._zmq: Any = importlib.import_module("zmq")
        self._memory, self._options = memory, options
        self._context = self._zmq.Context()

    def _socket(self, kind: str) -> Any:  # noqa: ANN401  # the wheel need not be installed
        socket = self._context.socket(getattr(self._zmq, kind))
        socket.linger = 0
        # Unbounded queues: by default it stops at 1000 messages, and a list may have 2048.
        socket.sndhwm = socket.rcvhwm = 0
        return socket

    def _receive(self, socket: Any, views: list[memoryview]) -> None:  # noqa: ANN401  # as above
        for view in views:
            got = socket.recv_into(view)
            if got != view.nbytes:
                raise BackendFailed(f"ZeroMQ brought {got} bytes where {view.nbytes} were due")

    @staticmethod
    def _send(socket: Any, views: list[memoryview]) -> None:  # noqa: ANN401  # as above
        for view in views:
            socket.send(view, copy=False)

    def _views(self, offsets: NDArray[np.uint64], lengths: NDArray[np.uint64]) -> list[memoryview]:
        whole = self._memory.data
        ends = (offsets + lengths).tolist()
        return [whole[first:end] for first, end in zip(offsets.tolist(), ends, strict=True)]


class Target(_Side, base.Target):
    """One thread that answers who asks for a connection, one more for each connection."""

    def __init__(self, memory: NDArray[np.uint8], options: Mapping[str, str]) -> None:
        super().__init__(memory, options)
        self._door = self._socket("REP")
        self._address = self._bind(self._door)
        self._threads = [threading.Thread(target=self._answer, daemon=True)]
        self._threads[0].start()

    @override
    def address(self) -> dict[str, str]:
        return {"door": self._address}

    def _bind(self, socket: Any) -> str:  # noqa: ANN401  # as above
        wild = "ipc://*" if self._options["scheme"] == "ipc" else f"tcp://{self._host()}:*"
        socket.bind(wild)
        return str(socket.last_endpoint.decode())

    def _host(self) -> str:
        return self._options.get("host", "127.0.0.1")

    def _answer(self) -> None:
        with contextlib.suppress(self._zmq.ContextTerminated):
            while True:
                work = msgspec.msgpack.decode(self._door.recv(), type=_List)
                socket = self._socket("PAIR")
                thread = threading.Thread(target=self._serve, args=(socket, work), daemon=True)
                self._threads.append(thread)
                self._door.send_string(self._bind(socket))
                thread.start()
        self._door.close()

    def _serve(self, socket: Any, work: _List) -> None:  # noqa: ANN401  # as above
        views = self._views(
            np.frombuffer(work.offsets, np.uint64), np.frombuffer(work.lengths, np.uint64)
        )
        with contextlib.suppress(self._zmq.ContextTerminated):
            while socket.recv():
                if work.op == "read":
                    self._send(socket, views)
                else:
                    self._receive(socket, views)
                    socket.send(b"")
        socket.close()

    @override
    def close(self) -> None:
        # Ending the context interrupts the threads' calls, but waits until they closed.
        self._context.term()
        for thread in self._threads:
            thread.join()


class Initiator(_Side, base.Initiator):
    """One socket for each prepared list."""

    def __init__(self, memory: NDArray[np.uint8], options: Mapping[str, str]) -> None:
        super().__init__(memory, options)
        self._sockets: list[Any] = []

    @override
    def connect(self, address: Mapping[str, str]) -> None:
        self._door = address["door"]

    @override
    def prepare(self, transfer: Transfer) -> Callable[[], None]:
        if "merge" in self._options:
            transfer = merged(transfer)
        views = self._views(transfer.local, transfer.lengths)
        socket = self._open(
            _List(transfer.op, transfer.remote.tobytes(), transfer.lengths.tobytes())
        )

        def run() -> None:
            try:
                socket.send(b"go")
                if transfer.op == "read":
                    self._receive(socket, views)
                else:
                    self._send(socket, views)
                    socket.recv()
            except self._zmq.Again as error:
                raise BackendFailed(
                    f"ZeroMQ's target at {self._door} was silent for {LIMIT_MS} ms during a "
                    f"{transfer.op}; see its log"
                ) from error

        return run

    def _open(self, work: _List) -> Any:  # noqa: ANN401  # as above
        door = self._socket("REQ")
        door.rcvtimeo = LIMIT_MS
        door.connect(self._door)
        door.send(msgspec.msgpack.encode(work))
        socket = self._socket("PAIR")
        socket.rcvtimeo = socket.sndtimeo = LIMIT_MS
        socket.connect(door.recv_string())
        door.close()
        self._sockets.append(socket)
        return socket

    @override
    def close(self) -> None:
        for socket in self._sockets:
            socket.linger = 1000
            socket.send(b"")  # its thread on the other side ends
            socket.close()
        self._sockets.clear()
        self._context.term()
