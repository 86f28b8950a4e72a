"""Which grants this engine still honours, and who is serving one right now."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

from mooncake_engine.errors import LaneError
from mooncake_engine.types import Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Protocol

    class Ledger(Protocol):
        """Another server under these grants, beside Python's: `mooncake_engine.native.ledgers`."""

        def add(self, grant: bytes) -> None:
            """Honour it from now on."""

        def revoke(self, grant: bytes) -> None:
            """Honour it no more; who is served under it has left when this returns."""


class GrantTable:
    """Live grants. `revoke` returns only when nobody serves the grant any more.

    The empty grant needs no permission: the memory was registered, that is all. A server of
    bytes (tcp) wraps each slice in `serving`; shm and rdma targets have no say, there the reader
    confirms with the grant's owner after its last byte.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()  # guards all below
        self._live: set[bytes] = set()
        self._serving: dict[bytes, list[Callable[[], None]]] = {}
        self._ledgers: list[Ledger] = []

    def follow(self, ledger: Ledger) -> None:
        """Keep `ledger` equal to this table, from now on."""
        with self._changed:
            for grant in self._live:
                ledger.add(grant)
            self._ledgers.append(ledger)

    def add(self, grant: bytes) -> None:
        """Honour `grant` from now on."""
        if not grant:
            raise ValueError("the empty grant is always honoured and cannot be added")
        with self._changed:
            self._live.add(grant)
            for ledger in self._ledgers:
                ledger.add(grant)

    def revoke(self, grant: bytes) -> None:
        """Stop honouring `grant`: interrupt those who serve it and wait until they left.

        Blocks for the time that one interrupted socket call needs to return. Idempotent.
        """
        with self._changed:
            self._live.discard(grant)
            for interrupt in self._serving.get(grant, ()):
                interrupt()
            for ledger in self._ledgers:  # under the lock: an `add` and a `revoke` keep their order
                ledger.revoke(grant)
            self._changed.wait_for(lambda: grant not in self._serving)

    @contextlib.contextmanager
    def serving(self, grant: bytes, interrupt: Callable[[], None]) -> Iterator[None]:
        """Serve one slice under `grant`; `interrupt` is called when it is revoked meanwhile.

        Raises:
            LaneError: REFUSED when the grant is not alive.
        """
        if not grant:
            yield
            return
        with self._changed:
            if grant not in self._live:
                raise LaneError(
                    Status.REFUSED, f"grant {grant.hex()} has ended or was never given here"
                )
            self._serving.setdefault(grant, []).append(interrupt)
        try:
            yield
        finally:
            with self._changed:
                serving = self._serving[grant]
                serving.remove(interrupt)
                if not serving:
                    del self._serving[grant]
                self._changed.notify_all()
