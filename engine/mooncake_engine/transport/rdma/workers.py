"""The threads that sleep until a NIC speaks."""

from __future__ import annotations

import errno
import logging
import os
import select
import threading
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from mooncake_engine.transport.rdma.completions import Completions
    from mooncake_engine.transport.rdma.verbs.base import Channel

_log = logging.getLogger(__name__)


class Workers:
    """Threads over the completion channels of one NIC, on the CPUs near it.

    Channels are dealt to threads in turn; with more threads than channels several share one.
    """

    def __init__(
        self,
        name: str,
        count: int,
        channels: Sequence[Channel],
        completions: Iterable[Completions],
        cpus: frozenset[int] | None,
    ) -> None:
        """Args: cpus: where to run; None: anywhere."""
        self._by_channel = {
            channel: [c for c in completions if c.channel is channel] for channel in channels
        }
        self._cpus = cpus
        self._later: deque[Callable[[], object]] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closed = threading.Event()
        self._polls: list[select.epoll] = []
        self._threads = []
        for index in range(count):
            mine = [c for i, c in enumerate(channels) if i % count == index % len(channels)]
            poll = select.epoll()  # here, where a lack of descriptors is heard of
            self._polls.append(poll)
            poll.register(self._wake, select.EPOLLIN)
            for channel in mine:
                _listen(poll, channel.fileno())
            thread = threading.Thread(
                target=self._run, args=(mine, poll), name=f"rdma-{name}-{index}", daemon=True
            )
            self._threads.append(thread)
        for thread in self._threads:
            thread.start()

    def later(self, action: Callable[[], object]) -> None:
        """Run `action` on one of the threads, soon. Never waits."""
        self._later.append(action)
        os.eventfd_write(self._wake, 1)

    def _run(self, channels: Sequence[Channel], poll: select.epoll) -> None:
        self._pin()
        speaking = {channel.fileno(): channel for channel in channels}
        while not self._closed.is_set():
            self._answer([descriptor for descriptor, _ in poll.poll()], speaking)

    def _answer(self, ready: Iterable[int], speaking: Mapping[int, Channel]) -> None:
        for descriptor in ready:
            try:
                if descriptor == self._wake:
                    self._act()
                else:
                    self._serve(speaking[descriptor])
            except Exception:  # noqa: BLE001 - a bug must not end the only waiting thread
                _log.exception("a thread for completions of RDMA failed; it goes on")

    def _pin(self) -> None:
        allowed = os.sched_getaffinity(0)
        near = (self._cpus or frozenset()) & allowed  # a container may not have them
        if near and near != allowed:
            os.sched_setaffinity(0, near)

    def _serve(self, channel: Channel) -> None:
        channel.drain()
        for completions in self._by_channel[channel]:
            completions.serve()

    def _act(self) -> None:
        while self._later:
            try:
                action = self._later.popleft()
            except IndexError:  # another thread was faster
                return
            action()
        if not self._closed.is_set():  # else it stays readable for all of them
            try:
                os.eventfd_read(self._wake)
            except BlockingIOError:
                return
            if self._later:  # came between the two
                os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """End the threads. Idempotent."""
        if self._closed.is_set():
            return
        self._closed.set()
        os.eventfd_write(self._wake, 1)
        for thread in self._threads:
            thread.join()
        for poll in self._polls:
            poll.close()
        os.close(self._wake)


def _listen(poll: select.epoll, descriptor: int) -> None:
    """Wake one thread for one event. A channel that is an epoll itself (pyverbs) wakes them all."""
    try:
        poll.register(descriptor, select.EPOLLIN | select.EPOLLEXCLUSIVE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        poll.register(descriptor, select.EPOLLIN)
