"""Completion channels and queues of the pyverbs binding.

pyverbs takes a channel's event for one completion queue that the caller names beforehand, and an
event of another queue is lost: nobody acknowledges it, and destroying that queue waits for ever.
So each queue has a channel of its own here, and what the seam calls a channel is an epoll over
them.
"""

from __future__ import annotations

import os
import select
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from mooncake_engine.transport.rdma.verbs import abi
from mooncake_engine.transport.rdma.verbs import pyverbs_calls as calls
from mooncake_engine.transport.rdma.verbs.base import Channel, CompletionQueue, VerbsError
from mooncake_engine.transport.rdma.verbs.pyverbs_calls import attempting

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mooncake_engine.transport.rdma.verbs.pyverbs_slots import Slots

#: Guards the look at this process's descriptors before and after a channel is made.
_making = threading.Lock()


class PyVerbsChannel(Channel):
    """An epoll over a pyverbs CompChannel for each completion queue."""

    def __init__(self, context: calls.device.Context, device: str) -> None:
        self._context = context
        self._device = device
        self._epoll = select.epoll()
        self._lock = threading.Lock()  # guards the next
        self._queues: dict[int, PyVerbsCompletionQueue] = {}

    def opened_for(self, queue: PyVerbsCompletionQueue) -> calls.cq.CompChannel:
        """A CompChannel for one completion queue."""
        made, fd = _completion_channel(self._context, self._device)
        with self._lock:
            self._queues[fd] = queue
            self._epoll.register(fd, select.EPOLLIN)
        return made

    def forget(self, queue: PyVerbsCompletionQueue) -> None:
        """The queue is about to close its CompChannel."""
        with self._lock:
            for fd in [fd for fd, owner in self._queues.items() if owner is queue]:
                del self._queues[fd]
                self._epoll.unregister(fd)

    @override
    def fileno(self) -> int:
        return self._epoll.fileno()

    @override
    def drain(self) -> None:
        with self._lock:
            while ready := self._epoll.poll(0):
                for fd, _ in ready:
                    self._queues[fd].take_event()

    @override
    def close(self) -> None:
        self._epoll.close()


def _completion_channel(
    context: calls.device.Context, device: str
) -> tuple[calls.cq.CompChannel, int]:
    """A pyverbs CompChannel and its descriptor, non-blocking."""
    attempted = f"a completion channel on {device}"
    with attempting(attempted), _making:
        before = _channel_descriptors()
        made = calls.cq.CompChannel(context)
        fds = _channel_descriptors() - before
    # Newer pyverbs tell the descriptor. Debian 12's does not, but no other thread makes one
    # through here meanwhile.
    if hasattr(made, "fd"):
        fds = {int(made.fd)}
    if len(fds) != 1:
        made.close()
        raise VerbsError(0, f"{attempted}: its descriptor cannot be told from {sorted(fds)}")
    fd = fds.pop()
    os.set_blocking(fd, False)
    return made, fd


def _channel_descriptors() -> set[int]:
    """This process's descriptors that are completion channels (or a device's events)."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if str(entry.readlink()) == "anon_inode:[infinibandevent]":
                found.add(int(entry.name))
        except OSError:  # closed meanwhile by another thread
            continue
    return found


class PyVerbsCompletionQueue(CompletionQueue):
    """A pyverbs CQ and its CompChannel."""

    def __init__(
        self, context: calls.device.Context, device: str, depth: int, channel: PyVerbsChannel
    ) -> None:
        self._channel = channel
        self._own = channel.opened_for(self)
        try:
            with attempting(f"a completion queue of {depth} on {device}"):
                self.queue: Any = calls.cq.CQ(context, depth, None, self._own, 0)
        except VerbsError:
            channel.forget(self)
            self._own.close()
            raise
        self.depth = int(self.queue.cqe)
        self.slots: dict[int, Slots] = {}  # of the queue pairs that send to here, by number

    def take_event(self) -> None:
        """Take and acknowledge one event, which must be there: the call would hold the lock."""
        with attempting("taking the event of a completion queue"):
            self._own.get_cq_event(self.queue)
            self.queue.ack_events(1)

    @override
    def arm(self) -> None:
        with attempting("arming a completion queue"):
            self.queue.req_notify()

    @override
    def poll(self, into: NDArray[np.void]) -> int:
        with attempting("polling a completion queue"):
            count, found = self.queue.poll(into.size)
        for row, one in enumerate(found):
            received = self._note(one)
            imm = socket.ntohl(one.imm_data)
            into[row] = (one.wr_id, one.status, one.vendor_err, one.qp_num, imm, received, 0)
        return int(count)

    def _note(self, one: calls.cq.WC) -> bool:
        """Free the places that a completion shows to be free; whether it is a receive's."""
        slots = self.slots.get(one.qp_num)
        if one.status:  # its opcode is not valid
            if slots is not None:
                slots.failed()
            return False
        if one.opcode == abi.WC_RECV_RDMA_WITH_IMM:
            return True
        if slots is not None:  # closed meanwhile
            slots.succeeded()
        return False

    @override
    def close(self) -> None:
        queue, self.queue = self.queue, None
        if queue is not None:
            self._channel.forget(self)
            with attempting("closing a completion queue"):
                queue.close()
                self._own.close()
