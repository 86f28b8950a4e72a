"""Errors of misuse and set-up. A transfer that fails is a `Completion`, not an exception.

EngineError
├── ConfigError            a field, variable or flag that cannot be used
├── EngineClosed           the engine was closed
├── InvalidTransfer        the arrays of a submit are wrong (sizes, lengths, overlap)
│   └── OutOfBounds        an address lies outside every registered region
├── UnknownSegment         nobody of that name in the metadata store
├── PathUnavailable        no permitted transport reaches that segment
├── MetadataError          the metadata store cannot be reached or refuses us
└── LaneError              (internal to transports) one slice failed; becomes a Completion
    └── PathLost           the way to the peer is gone, not the peer: another path may be taken
"""

from __future__ import annotations

from mooncake_engine.types import Status


class EngineError(Exception):
    """Base of all errors that the engine raises."""


class ConfigError(EngineError):
    """A setting that cannot be used; the message names it, its value and what to do."""


class EngineClosed(EngineError):
    """The engine was closed; nothing can be registered or submitted any more."""


class InvalidTransfer(EngineError, ValueError):
    """The arrays given to submit do not describe a transfer."""


class OutOfBounds(InvalidTransfer):
    """An address lies outside every registered region."""


class UnknownSegment(EngineError, LookupError):
    """The metadata store knows no segment of that name."""


class PathUnavailable(EngineError):
    """No permitted transport reaches the segment; the message lists each one's reason."""


class MetadataError(EngineError):
    """The metadata store cannot be reached or refuses us."""


class LaneError(EngineError):
    """One slice failed. Raised by a lane, turned into the batch's Completion by the worker."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status


class PathLost(LaneError):
    """The way to the peer is gone, not the peer; ends a batch PEER_GONE if there is no other way.

    What a lane promises when it raises this is in `mooncake_engine.transport.base`.
    """

    def __init__(self, message: str) -> None:
        super().__init__(Status.PEER_GONE, message)
