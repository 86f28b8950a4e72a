"""Messages about transfers that the framework has not told prefill of yet. Pure."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

from mooncake_connector import wire

if TYPE_CHECKING:
    from mooncake_connector.control import Channel

Early = wire.Subscribe | wire.Claim | wire.Release


class Parked(NamedTuple):
    """One of them; `channel` is None when its sender died meanwhile."""

    channel: Channel | None
    message: Early
    expires: float


class Parking:
    """All of them, in the order in which they came. Not thread-safe."""

    def __init__(self) -> None:
        self._parked: dict[str, list[Parked]] = defaultdict(list)

    def add(self, channel: Channel, message: Early, expires: float) -> None:
        """Keep it until its transfer is opened, or until then."""
        self._parked[message.transfer_id].append(Parked(channel, message, expires))

    def take(self, transfer_id: str) -> list[Parked]:
        """The transfer is opened: what has waited for it."""
        return self._parked.pop(transfer_id, [])

    def lost(self, channel: Channel) -> None:
        """That sender died; what it said still tells that somebody wanted the transfer."""
        for entries in self._parked.values():
            entries[:] = [e._replace(channel=None) if e.channel is channel else e for e in entries]

    def expired(self, now: float) -> list[Parked]:
        """Take out what has waited for too long."""
        late = []
        for transfer_id, entries in list(self._parked.items()):
            late += [entry for entry in entries if entry.expires <= now]
            entries[:] = [entry for entry in entries if entry.expires > now]
            if not entries:
                del self._parked[transfer_id]
        return late
