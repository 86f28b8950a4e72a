"""What the benchmark asks of a transfer engine: ours, a peer's, or a loop in C that is the limit.

A *backend* is one module of `mooncake_connector.bench.backends`; it imports its engine only where
one of its sides is made. A *variant* is one way to run it. Each variant runs in two processes of
its own, the *sides*: a target whose memory is moved, and an initiator that asks for it.
"""

from __future__ import annotations

import abc
import enum
from typing import TYPE_CHECKING, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class Route(enum.StrEnum):
    """What carries the bytes; only variants of one route are compared."""

    TCP = "tcp"
    SAME_HOST = "same host"
    RDMA = "rdma"


class Variant(msgspec.Struct, frozen=True, kw_only=True):
    """One backend with one set of settings.

    Attributes:
        backend: Name of its module in `mooncake_connector.bench.backends`.
        name: As shown in tables, unique: "NIXL tcp, no progress thread".
        options: What its sides are told; `host`, the address by which the other side reaches this
            one, is added where it is not given.
        environment: Variables of both processes.
        is_limit: It is no engine but what the machine can do.
        moves_bytes: False: it measures with buffers of its own, so that there is nothing to check.
    """

    backend: str
    name: str
    route: Route
    options: dict[str, str] = {}
    environment: dict[str, str] = {}
    is_limit: bool = False
    moves_bytes: bool = True


class Transfer(msgspec.Struct, frozen=True):
    """What one run moves: row i is `lengths[i]` > 0 bytes.

    Attributes:
        op: "read" (target's memory to the initiator's) or "write".
        local: Offsets in the initiator's buffer, uint64 of shape (n,).
        remote: Offsets in the target's buffer, uint64 of shape (n,).
        lengths: Bytes, uint64 of shape (n,).
    """

    op: str
    local: NDArray[np.uint64]
    remote: NDArray[np.uint64]
    lengths: NDArray[np.uint64]

    @property
    def nbytes(self) -> int:
        """Bytes of one run."""
        return int(self.lengths.sum())


class Target(abc.ABC):
    """The side whose memory is read or written. Serves from its making until `close`."""

    def __init__(  # noqa: B027 - what every side is made with; it has nothing to do here
        self, memory: NDArray[np.uint8], options: Mapping[str, str]
    ) -> None:
        """Start the engine and register `memory`, page aligned; the caller keeps it alive."""

    @abc.abstractmethod
    def address(self) -> dict[str, str]:
        """What an initiator needs to find this target, its memory included; goes through JSON."""

    @abc.abstractmethod
    def close(self) -> None:
        """End the engine."""


class Initiator(abc.ABC):
    """The side that asks."""

    def __init__(  # noqa: B027 - what every side is made with; it has nothing to do here
        self, memory: NDArray[np.uint8], options: Mapping[str, str]
    ) -> None:
        """Start the engine and register `memory`; the target is not known yet."""

    @abc.abstractmethod
    def connect(self, address: Mapping[str, str]) -> None:
        """Reach the target; its time is part of the first contact."""

    @abc.abstractmethod
    def prepare(self, transfer: Transfer) -> Callable[[], float | None]:
        """Do what the engine permits to do once for many runs of the same transfer.

        Called once by each thread that measures, on that thread. Returns a function that moves
        the bytes once and returns when all are in place, or raises `BackendFailed`. It may return
        the seconds from its call until then by the engine's own clock, which does not run on while
        the caller waits for the interpreter lock.

        The function may have two attributes: `many(count)` moves them so many times and returns
        the seconds of each run as float64 (a loop in C that takes the time itself); `close()`,
        called on the same thread, gives back what was prepared.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """End the engine."""


class BackendFailed(Exception):
    """A side cannot be made, or a transfer failed: what, with whom, and what to do."""


class Backend(Protocol):
    """What a module in `backends` holds."""

    def missing(self) -> str:
        """Why it cannot run here and what to install, as one sentence; empty: it can.

        Cheap: looks for the package or program, starts nothing.
        """

    def variants(self, route: Route) -> tuple[Variant, ...]:
        """All ways to run it over this route, its best settings and its defaults. Empty: none."""

    Target: type[Target]
    Initiator: type[Initiator]
