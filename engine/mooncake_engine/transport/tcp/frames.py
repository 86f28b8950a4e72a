"""Where a served lane's frames come from: its socket, or the loop in C that serves most itself."""

from __future__ import annotations

import abc
import contextlib
import enum
import os
from typing import TYPE_CHECKING

import numpy as np
from typing_extensions import override

from mooncake_engine.iovec import address_of
from mooncake_engine.native import Outcome
from mooncake_engine.native.ledgers import GrantLedger, RegionLedger, owned
from mooncake_engine.transport.tcp import wire
from mooncake_engine.transport.tcp.stream import whole

if TYPE_CHECKING:
    from mooncake_engine.grants import GrantTable
    from mooncake_engine.memory import RegionTable
    from mooncake_engine.native import Library
    from mooncake_engine.transport.tcp.stream import Stream


class Arrived(enum.Enum):
    """How much of the next frame was received."""

    NOTHING = enum.auto()  # the peer left
    HEADER = enum.auto()
    BODY = enum.auto()  # and addresses, lengths and grant


class Frames(abc.ABC):
    """One buffer per lane for its whole life: a peer's numbers allocate nothing.

    Attributes:
        header: The next frame's.
        body: Room for its addresses, lengths and grant, right behind the header.
    """

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._frame = np.empty(wire.REQUEST.size + wire.MAX_BODY, np.uint8)
        self.header = self._frame[: wire.REQUEST.size]
        self.body = self._frame[wire.REQUEST.size :]

    @abc.abstractmethod
    def next(self) -> Arrived:
        """Wait for the next frame that nobody served yet, for as long as it takes.

        Raises:
            BlockingIOError: The peer stopped taking or sending bytes in the middle of a frame.
            OSError | EOFError: The connection broke in the middle of a frame, or was shut down.
        """


class PythonFrames(Frames):
    """Every frame, its header only."""

    @override
    def next(self) -> Arrived:
        while True:
            runs = whole(self.header)
            with contextlib.suppress(BlockingIOError):  # idle is not stopped: no frame is begun
                count = self.stream.receive_some(runs)
                break
        if not count:
            return Arrived.NOTHING
        rest = self.header[count:]
        self.stream.receive(whole(rest), rest.size)
        return Arrived.HEADER


class Ledgers:
    """What the loops of one server consult, in step with this engine's tables."""

    def __init__(self, library: Library, regions: RegionTable, grants: GrantTable) -> None:
        self.library = library
        self.regions = RegionLedger(library)
        self.grants = GrantLedger(library)
        regions.follow(self.regions)
        grants.follow(self.grants)


class NativeFrames(Frames):
    """Those that serve.c did not serve: malformed, or not permitted as far as it knows."""

    def __init__(self, stream: Stream, ledgers: Ledgers) -> None:
        super().__init__(stream)
        self._ledgers = ledgers  # also keeps them alive for as long as C may look into them
        library = ledgers.library
        made = library.serving_new(
            stream.fileno(),
            ledgers.regions.pointer,
            ledgers.grants.pointer,
            address_of(self._frame),
            wire.MAX_NBYTES,
            wire.MAX_RUNS,
            wire.MAX_GRANT,
        )
        self._state = owned(self, made, library.serving_free, "a served tcp lane's state")

    @override
    def next(self) -> Arrived:
        match outcome := self._ledgers.library.serve(self._state):
            case Outcome.ENDED:
                return Arrived.NOTHING
            case Outcome.HANDED:
                return Arrived.HEADER
            case Outcome.HANDED_BODY:
                return Arrived.BODY
            case Outcome.CUT:
                raise EOFError
            case _:
                raise OSError(-outcome, os.strerror(-outcome))
