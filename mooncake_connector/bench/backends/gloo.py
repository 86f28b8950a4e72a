"""torch.distributed's send and receive over gloo: what a pipeline stage hands to the next.

It has no read and write: the target knows the list from `prepare`, sends what a read asks for and
receives what a write brings, on a thread and under message tags of its own for each list.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import threading
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
from typing_extensions import override

from mooncake_connector.bench import base
from mooncake_connector.bench.base import BackendFailed, Route, Variant
from mooncake_connector.bench.runs import merged

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from mooncake_connector.bench.base import Transfer

LIMIT = timedelta(minutes=5)  # between two turns nothing is said
OPEN, DOOR = 1, 0  # the first word of what is sent under the tag DOOR
TARGET, INITIATOR = 0, 1  # ranks


def missing() -> str:
    """Why gloo cannot run here; empty when it can."""
    if importlib.util.find_spec("torch"):
        return ""
    return "torch, which carries gloo, is not installed: pip install torch (its CPU build will do)"


def variants(route: Route) -> tuple[Variant, ...]:
    """A message for each descriptor, and for each run of them."""
    if route is not Route.TCP:
        return ()
    return tuple(
        Variant(
            backend="gloo",
            name=f"gloo{', runs merged' if merge else ''}",
            route=route,
            options={"merge": "yes"} if merge else {},
        )
        for merge in (False, True)
    )


class _Side:
    """One rank of a group of two."""

    def __init__(self, memory: NDArray[np.uint8], options: Mapping[str, str]) -> None:
        import torch
        import torch.distributed

        self._group: Any = torch.distributed
        self._memory = torch.from_numpy(memory)
        self._from_numpy: Any = torch.from_numpy
        self._options = options
        self._host = options.get("host", "127.0.0.1")
        torch.set_num_threads(1)
        if self._host.startswith("127."):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

    def _join(self, rank: int, where: str) -> None:
        self._peer = INITIATOR if rank == TARGET else TARGET
        try:
            self._group.init_process_group(
                "gloo", init_method=f"tcp://{where}", rank=rank, world_size=2, timeout=LIMIT
            )
        except Exception as error:  # its exceptions are its compiled module's own
            raise BackendFailed(f"gloo did not meet its other rank at {where}: {error}") from error

    def _words(self, words: list[int], tag: int) -> None:
        self._group.send(self._from_numpy(np.array(words, np.int64)), self._peer, tag=tag)

    def _heard(self, count: int, tag: int) -> NDArray[np.int64]:
        words = np.empty(count, np.int64)
        self._group.recv(self._from_numpy(words), self._peer, tag=tag)
        return words

    def _slots(self, offsets: NDArray[Any], lengths: NDArray[Any]) -> list[Any]:
        ends = (offsets + lengths).tolist()
        return [self._memory[a:b] for a, b in zip(offsets.tolist(), ends, strict=True)]

    def _move(self, slots: list[Any], tag: int, *, send: bool) -> None:
        call = self._group.isend if send else self._group.irecv
        for handle in [call(slot, self._peer, tag=tag) for slot in slots]:
            handle.wait()


class Target(_Side, base.Target):
    """Rank 0, which also holds the store where the two meet."""

    def __init__(self, memory: NDArray[np.uint8], options: Mapping[str, str]) -> None:
        super().__init__(memory, options)
        with socket.create_server((self._host, 0)) as free:
            self._where = f"{self._host}:{free.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._answer, daemon=True)]
        self._threads[0].start()

    @override
    def address(self) -> dict[str, str]:
        return {"where": self._where}

    def _answer(self) -> None:
        self._join(TARGET, self._where)
        # An initiator that dies closes its connections, and gloo raises.
        with contextlib.suppress(RuntimeError):
            while True:
                word, channel, count, reading = self._heard(4, DOOR).tolist()
                if word != OPEN:
                    break
                table = self._heard(2 * count, DOOR)
                slots = self._slots(table[:count], table[count:])
                thread = threading.Thread(
                    target=self._serve, args=(slots, channel, bool(reading)), daemon=True
                )
                self._threads.append(thread)
                thread.start()

    def _serve(self, slots: list[Any], channel: int, reading: bool) -> None:
        with contextlib.suppress(RuntimeError):
            while self._heard(1, 2 * channel).item():
                self._move(slots, 2 * channel + 1, send=reading)
                if not reading:
                    self._words([1], 2 * channel)

    @override
    def close(self) -> None:
        if self._group.is_initialized():
            self._group.destroy_process_group()


class Initiator(_Side, base.Initiator):
    """Rank 1."""

    def __init__(self, memory: NDArray[np.uint8], options: Mapping[str, str]) -> None:
        super().__init__(memory, options)
        self._channels = 0
        self._opening = threading.Lock()

    @override
    def connect(self, address: Mapping[str, str]) -> None:
        self._join(INITIATOR, address["where"])

    @override
    def prepare(self, transfer: Transfer) -> Callable[[], None]:
        if "merge" in self._options:
            transfer = merged(transfer)
        slots = self._slots(transfer.local, transfer.lengths)
        reading = transfer.op == "read"
        with self._opening:
            self._channels += 1
            channel = self._channels
            self._words([OPEN, channel, len(slots), int(reading)], DOOR)
            self._words([*transfer.remote.tolist(), *transfer.lengths.tolist()], DOOR)

        def run() -> None:
            try:
                self._words([1], 2 * channel)
                self._move(slots, 2 * channel + 1, send=not reading)
                if not reading:
                    self._heard(1, 2 * channel)
            except RuntimeError as error:
                raise BackendFailed(f"gloo's {transfer.op} failed: {error}") from error

        return run

    @override
    def close(self) -> None:
        if self._group.is_initialized():
            with contextlib.suppress(RuntimeError):  # the target may have ended first
                for channel in range(1, self._channels + 1):
                    self._words([0], 2 * channel)
                self._words([0, 0, 0, 0], DOOR)
            self._group.destroy_process_group()
