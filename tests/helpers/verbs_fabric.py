"""Stub NICs that are joined: bytes move, probes arrive, requests end when a thread lets them.

Engines run on them on any machine, with queues that end in an order of the test's choosing.
"""

from __future__ import annotations

import ctypes
import random
import threading
from typing import TYPE_CHECKING, ClassVar, Self

from mooncake_engine.transport.rdma.verbs.base import Opcode, QueueCaps, RemoteQueue, Work
from typing_extensions import override
from verbs_held import HeldQueuePair
from verbs_stub import Provider, StubCompletionQueue, StubDevice, StubVerbs

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NAMES = ("stub0", "stub1")
REFUSED = 10  # IBV_WC_REM_ACCESS_ERR


class WiredQueuePair(HeldQueuePair):
    """Moves a request's bytes when that ends, within this process."""

    fabric: ClassVar[Fabric]

    def __init__(
        self, provider: Provider, number: int, send: StubCompletionQueue, caps: QueueCaps
    ) -> None:
        super().__init__(provider, number, send, caps)
        self._moves: dict[int, list[tuple[int, int, int]]] = {}  # to, from, bytes
        self._rkeys: dict[int, int] = {}
        self._probes: dict[int, int] = {}
        self._peer = 0
        self.fabric.add(self)

    @override
    def to_rtr(self, peer: RemoteQueue) -> None:
        super().to_rtr(peer)
        self._peer = peer.number

    @override
    def post(
        self,
        opcode: Opcode,
        work: Work,
        rows: slice,
        lkeys: NDArray[np.uint32],
        rkeys: NDArray[np.uint32],
        *,
        wr_id: int,
        signal_every: int,
        inline: int,
    ) -> int:
        for row in range(rows.start, rows.stop):
            self._moves[wr_id + row - rows.start] = _moves(opcode, work, row)
            self._rkeys[wr_id + row - rows.start] = int(rkeys[row])
        accepted = super().post(
            opcode, work, rows, lkeys, rkeys, wr_id=wr_id, signal_every=signal_every, inline=inline
        )
        self.fabric.posted.set()
        return accepted

    @override
    def post_imm(self, imm: int, data: bytes, remote: int, rkey: int, *, wr_id: int) -> None:
        self._probes[wr_id] = imm
        super().post_imm(imm, data, remote, rkey, wr_id=wr_id)
        self.fabric.posted.set()

    @override
    def end(self, count: int) -> None:
        """As far as their keys open what is registered; the next one is refused then."""
        first = self.under_way[:count]
        opened = [self._rkeys.get(wr_id) in {None, *self.provider.rkeys} for wr_id in first]
        if all(opened):
            super().end(count)
        else:
            super().end(opened.index(False))
            self.fail(REFUSED)

    @override
    def arrived(self, wr_id: int) -> None:
        for to, source, size in self._moves.pop(wr_id, ()):
            ctypes.memmove(to, source, size)
        if wr_id in self._probes:
            self.fabric.deliver(self._peer, self._probes.pop(wr_id))

    @override
    def close(self) -> None:
        self.fabric.remove(self)
        super().close()


def _moves(opcode: Opcode, work: Work, row: int) -> list[tuple[int, int, int]]:
    far, moves = int(work.remote[row]), []
    first = int(work.sge_first[row])
    for entry in range(first, first + int(work.sge_count[row])):
        near, size = int(work.local[entry]), int(work.local_length[entry])
        moves.append((near, far, size) if opcode is Opcode.READ else (far, near, size))
        far += size
    return moves


class Fabric:
    """A context manager: while it runs, requests end in an order that only `seed` knows.

    Attributes:
        verbs: With two devices, `NAMES`.
        fail_every: One step in so many fails its queue pair; 0: none.
        failed: How many were failed so.
        posted: Set by whoever posts.
    """

    def __init__(
        self, seed: int, *, fail_every: int = 0, status: int = 12, together: bool = False
    ) -> None:
        self.posted = threading.Event()
        self.fail_every = fail_every
        self.failed = 0
        self._status = status
        self._together = together
        self._random = random.Random(seed)
        self._lock = threading.Lock()  # guards _pairs
        self._pairs: dict[int, WiredQueuePair] = {}
        self._ended = False
        self._going = threading.Event()  # else nothing ends
        self._going.set()
        self._thread = threading.Thread(target=self._run, name="fabric")
        pairs = type("WiredHere", (WiredQueuePair,), {"fabric": self})
        provider = Provider()
        self.verbs = StubVerbs(*(StubDevice(provider, name, queue_pairs=pairs) for name in NAMES))
        self.provider = provider

    def add(self, pair: WiredQueuePair) -> None:
        with self._lock:
            self._pairs[pair.number] = pair

    def remove(self, pair: WiredQueuePair) -> None:
        with self._lock:
            self._pairs.pop(pair.number, None)

    def deliver(self, number: int, imm: int) -> None:
        """A probe arrives at a queue pair, unless that is gone."""
        with self._lock:
            pair = self._pairs.get(number)
        if pair is not None and pair.receives is not None:
            pair.receives.complete(0, number, 0, imm)

    def hold(self) -> None:
        """Let nothing end until `release`."""
        self._going.clear()

    def release(self) -> None:
        self._going.set()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self.posted.set()
        self._going.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended:
            self.posted.wait()
            self.posted.clear()
            while not self._ended:
                self._going.wait()
                with self._lock:
                    pairs = list(self._pairs.values())
                busy = [pair for pair in pairs if pair.under_way]
                if not busy:
                    break
                pair = self._random.choice(busy)
                if self._together:  # all of them, before anybody has looked
                    for each in busy:
                        each.end(40)
                elif self.fail_every and not self._random.randrange(self.fail_every):
                    self.failed += 1
                    pair.fail(self._status)
                else:
                    pair.end(self._random.randint(1, 40))
