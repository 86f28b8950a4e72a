"""Large slices, moved over several connections at once by a team of threads in C (streams.c)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from typing_extensions import override

from mooncake_engine.iovec import address_of
from mooncake_engine.native import Outcome
from mooncake_engine.native.team import Team
from mooncake_engine.transport.tcp.exchange import Exchange, failure, refusal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mooncake_engine.native import Library
    from mooncake_engine.transport.tcp.stream import Stream
    from mooncake_engine.types import Slice

#: A piece of less costs more to ask for than it gains.
_LEAST_PIECE = 512 << 10
_TICK_S = 0.1  # members look at the clock so often while no byte moves


class WideExchange(Exchange):
    """Each stream moves pieces of the slice. After anything but success it is over."""

    most_runs = 1 << 32
    most_bytes = 1 << 62

    def __init__(self, library: Library, piece_bytes: int, streams: Sequence[Stream]) -> None:
        """Args: piece_bytes: at most so many are asked for in one request."""
        self._streams = tuple(streams)
        self._library = library
        for stream in streams:
            stream.set_timeouts(_TICK_S)
        descriptors = np.array([stream.fileno() for stream in streams], np.int32)
        made = library.streams_new(address_of(descriptors), len(streams))
        bounds = min(_LEAST_PIECE, piece_bytes), piece_bytes
        self._team = Team(library, made, len(streams), bounds, self._shut_down)
        self._over = False

    @override
    def move(self, piece: Slice, deadline: float, *, hurry: bool) -> str:
        if self._over:
            raise EOFError
        outcome = self._team.run(piece, deadline, hurry=hurry)
        if not outcome:
            self.moved_at = self._team.ended
            return ""
        self._over = True
        if outcome != Outcome.HANDED:
            raise failure(outcome)
        member = self._team.failed
        told = self._library.streams_told(self._team.pointer, member)
        try:
            return refusal(self._streams[member], told, deadline)
        finally:
            # Of what was asked for beside it some is on its way, and nobody takes it any more.
            for stream in self._streams:
                stream.shutdown()
                stream.reset_on_close()

    @override
    def close(self) -> None:
        self._team.close()

    def _shut_down(self) -> None:
        for stream in self._streams:
            stream.shutdown()
