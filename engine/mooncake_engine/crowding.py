"""Is the interpreter lock to be had? Told by who gave it up and had to wait for it.

Beside a thread that runs Python all the time, each return from a call without the lock waits for
the switch interval, 5 ms by default. Where that is so, a call of 2 ms is better made with the lock
held: the others lose less by that than we gain, and no more than to any other Python thread.
"""

from __future__ import annotations

import time

#: A wait that says something: nobody waits so long for a lock that is free, and for a core that
#: others use it is as well not to ask twice.
LONG_NS = 2_000_000
#: So long is one such wait believed. Then one call finds out anew, for 5 ms or so.
BELIEVED_S = 1.0


class Crowding:
    """What threads found out lately. Safe to use from any thread: one float, which is replaced."""

    def __init__(self) -> None:
        self._until = 0.0

    @property
    def crowded(self) -> bool:
        """Whether giving the lock up would cost more than a few milliseconds of holding it."""
        return self._until > 0.0 and time.monotonic() < self._until

    def waited(self, ns: int) -> None:
        """A thread that gave the lock up waited so long until it had it again."""
        if ns > LONG_NS:
            self._until = time.monotonic() + BELIEVED_S


#: There is one interpreter lock.
CROWDING = Crowding()
