"""Completion queues of one NIC: who polls them, how they never overflow, what wakes whom."""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING, Protocol

import numpy as np

from mooncake_engine.transport.rdma.verbs.base import COMPLETION, VerbsError

if TYPE_CHECKING:
    from mooncake_engine.transport.rdma.job import Job
    from mooncake_engine.transport.rdma.verbs.base import Channel, CompletionQueue, Device


class Owner(Protocol):
    """A queue pair's half that awaits completions."""

    def completed(self, wr_id: int, status: int, imm: int | None) -> int:
        """Called with the lock of its `Completions`; returns how many requests have ended."""


class Completions:
    """One completion queue and the queue pairs that complete into it.

    Whoever waits may `poll`; the thread of its channel does when nobody else is there. A request
    takes one of `depth` places before it is posted and gives it back when it has completed, so
    that the queue cannot overflow, however many queue pairs share it.
    """

    def __init__(
        self, device: Device, depth: int, channel: Channel, limit: int, *, keep_armed: bool = False
    ) -> None:
        """Make the queue.

        Args:
            device: The NIC.
            depth: Completions that it holds.
            channel: Told when one comes while armed.
            limit: Requests under way at most, if fewer than `depth`.
            keep_armed: Nobody waits for these completions, so the channel's thread has to.
        """
        self.queue: CompletionQueue = device.completion_queue(depth, channel)
        self.channel = channel
        self._keep_armed = keep_armed
        self.lock = threading.Lock()  # guards all below and what the owners count
        self._owners: dict[int, Owner] = {}
        depth = min(depth, self.queue.depth)
        self._kept = 1 + depth // 16  # places for probes, which nobody waits for
        self._free = min(limit, depth - self._kept)
        self._taken = 0
        self._found = np.zeros(256, COMPLETION)
        self._starved: set[Job] = set()

    def add(self, number: int, owner: Owner) -> None:
        """Hand completions of queue pair `number` to `owner`."""
        with self.lock:
            self._owners[number] = owner

    def remove(self, number: int, owner: Owner) -> None:
        """Forget a queue pair that was destroyed, and what it completed before.

        A device does not take that out of the queue; it would take places that are given back.
        """
        self.drain()
        with self.lock:
            if self._owners.get(number) is owner:  # else a new queue pair has got its number
                del self._owners[number]

    def drain(self) -> None:
        """Poll until the queue is empty."""
        while self.poll():
            pass

    def take(self, wanted: int, job: Job) -> int:
        """Take up to `wanted` places; with none left `job` is woken when there are. Lock held."""
        given = min(wanted, max(0, self._free))
        self._free -= given
        self._taken += given
        if not given:
            self._starved.add(job)
        return given

    def reserve(self) -> None:
        """Take one of the places kept for probes. Lock held. Raises `VerbsError`: none is left."""
        if self._free + self._kept <= 0:
            raise VerbsError(errno.ENOSPC, "finding a place in a completion queue for a probe")
        self._free -= 1
        self._taken += 1

    def give_back(self, count: int) -> None:
        """Places of requests that have completed, or were never posted. Lock held."""
        self._free += count
        self._taken -= count
        if count:
            self._wake()

    def _wake(self) -> None:
        starved, self._starved = self._starved, set()
        for job in starved:
            job.wake()

    def wake_starved(self) -> None:
        """Let those who wait for room look again: their queue pair failed."""
        with self.lock:
            self._wake()

    def starve(self, job: Job) -> None:
        """Wake `job` at the next completion: its queue pair is full. Lock held."""
        self._starved.add(job)

    def poll(self) -> int:
        """Take what completed and tell the owners; returns how many. Any thread; never waits."""
        with self.lock:
            count = self.queue.poll(self._found)
            ended = 0
            for wr_id, status, number, imm, received in self._found[:count][_FIELDS].tolist():
                owner = self._owners.get(number)
                if owner is not None:  # else of a queue pair that was closed meanwhile
                    ended += owner.completed(wr_id, status, imm if received else None)
            self.give_back(ended)
            return count

    def arm(self) -> None:
        """Make the next completion wake the channel's thread, then take what came before."""
        with self.lock:
            self.queue.arm()
        self.poll()

    def serve(self) -> None:
        """The channel spoke: poll until empty, and arm again while anything is under way."""
        self.drain()
        if self._taken or self._keep_armed:
            self.arm()

    def close(self) -> None:
        """After its queue pairs."""
        self.queue.close()


_FIELDS = ["wr_id", "status", "qp_num", "imm", "received"]
