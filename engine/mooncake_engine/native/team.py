"""A team of threads in C that move one large slice together (team.c), as a transport uses it."""

from __future__ import annotations

import sys
import time
import weakref
from typing import TYPE_CHECKING

import numpy as np

from mooncake_engine.crowding import CROWDING
from mooncake_engine.iovec import address_of
from mooncake_engine.native import Outcome, packed

if TYPE_CHECKING:
    from collections.abc import Callable

    from mooncake_engine.native import Library
    from mooncake_engine.types import Slice

#: Beside a busy Python thread a slice up to this may be moved with the interpreter lock held, for a
#: switch interval at most, as any Python thread does: to give the lock up would cost as much.
_HELD_BYTES = 8 << 20
#: So long the calling thread stays in C: then Python looks for signals.
_WAIT_NS = 100_000_000
_MOST_NS = (1 << 63) - 1
#: Each thread has about so many pieces to take, so that one whose core is busy takes fewer.
_PIECES_EACH = 4
_PAGE = 4096


class Team:
    """Moves slices of any number of runs, one slice at a time, for one thread at a time."""

    def __init__(
        self,
        library: Library,
        pointer: int | None,
        size: int,
        piece_bytes: tuple[int, int],
        interrupt: Callable[[], None],
    ) -> None:
        """Take over what `streams_new` or `copies_new` made.

        Args:
            library: Of `pointer`.
            pointer: None is a `MemoryError`.
            size: Of the team.
            piece_bytes: A piece has at least and at most so many, but for the last.
            interrupt: Makes members return soon that wait for something; for when the calling
                thread must not wait for them any longer.
        """
        if not pointer:
            raise MemoryError("no threads to move slices with")
        self._library = library
        self.pointer = pointer
        #: Ends the threads; never while a slice moves. Idempotent.
        self.close = weakref.finalize(self, library.team_free, pointer)
        self.close.atexit = False  # nor where a thread that nobody joined is in `run`
        self._size = size
        self._least, self._most = piece_bytes
        self._interrupt = interrupt
        self._ended = np.zeros(1, np.int64)
        self._ended_at = address_of(self._ended)

    @property
    def ended(self) -> float:
        """When the last run ended, `time.monotonic()`."""
        return int(self._ended[0]) / 1e9

    @property
    def failed(self) -> int:
        """The member that ended the last run."""
        return int(self._library.team_failed(self.pointer))

    def run(self, piece: Slice, deadline: float, *, hurry: bool) -> int:
        """Move the slice; how that ended (`Outcome`, or -errno). No member touches it any more.

        `hurry` is `Lane.hurry`.
        """
        share = piece.nbytes // (self._size * _PIECES_EACH)
        piece_bytes = max(self._least, min(share, self._most)) // _PAGE * _PAGE
        deadline_ns = min(int(deadline * 1e9), _MOST_NS)
        held = hurry and piece.nbytes <= _HELD_BYTES and CROWDING.crowded
        start = self._library.holding.team_run if held else self._library.team_run
        limit = int(sys.getswitchinterval() * 1e9) if held else _WAIT_NS
        try:
            outcome: int = start(
                self.pointer, packed(piece), piece_bytes, deadline_ns, limit, self._ended_at
            )
            while outcome == Outcome.AGAIN:
                held = False
                outcome = self._wait()
        except BaseException:  # Ctrl-C, where the caller's own thread moves the slice
            self.stop()
            while self._wait() == Outcome.AGAIN:
                pass
            raise
        if not held:
            CROWDING.waited(time.monotonic_ns() - int(self._ended[0]))
        return outcome

    def stop(self) -> None:
        """End the run under way soon, if there is one; any thread."""
        self._library.team_stop(self.pointer)
        self._interrupt()

    def _wait(self) -> int:
        return int(self._library.team_wait(self.pointer, _WAIT_NS, self._ended_at))
