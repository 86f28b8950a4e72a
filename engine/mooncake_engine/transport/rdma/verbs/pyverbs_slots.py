"""How many requests a send queue of the pyverbs binding has room for. Pure counting."""

from __future__ import annotations

from collections import deque


class Slots:
    """The places of one send queue.

    pyverbs must not be asked which request of a chain was refused: when the provider names none,
    it copies from address zero and the process is gone (rxe names none when a queue pair is not
    ready or its device was taken away). So none is ever refused for want of room: a place is free
    again when a completion shows that its request has ended.

    One thread posts and one polls, each under its lock; each writes a counter of its own.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._taken = 0  # written by who posts
        self._ended = 0  # written by who polls
        self._groups: deque[int] = deque()  # requests up to each signalled one, that included

    @property
    def free(self) -> int:
        """Requests that may be posted now."""
        return self._total - (self._taken - self._ended)

    def take(self, count: int, signal_every: int) -> None:
        """Before `count` requests are posted, the last one signalled."""
        whole, rest = divmod(count, signal_every)
        self._groups.extend([signal_every] * whole + [rest] * bool(rest))
        self._taken += count

    def give_back(self, count: int, signal_every: int) -> None:
        """The post failed and nothing of it was accepted."""
        for _ in range(-(-count // signal_every)):
            self._groups.pop()
        self._taken -= count

    def succeeded(self) -> None:
        """A signalled request has; and with it those before it, which ended in order."""
        self._ended += self._groups.popleft()

    def failed(self) -> None:
        """A request has, signalled or not. It may have been a receive: nobody says which."""
        self._ended = min(self._ended + 1, self._taken)
