"""Which data-parallel rank of prefill has a request, where the room does not say it. Pure."""

from __future__ import annotations

#: The oldest go first above it: 21 MB of them, and at a thousand requests a second two minutes.
LIMIT = 1 << 17


class RoomRanks:
    """bootstrap_room -> data-parallel rank; bounded in number and time. Not thread-safe.

    Args:
        lifetime_s: How long a room is known after it was registered.
        limit: How many rooms are known at most.
    """

    def __init__(self, lifetime_s: float, limit: int = LIMIT) -> None:
        self._lifetime_s = lifetime_s
        self._limit = limit
        self._rooms: dict[int, tuple[int, float]] = {}  # oldest first; the time it is known until

    def __len__(self) -> int:
        """How many rooms are held, counting those that nobody has removed yet."""
        return len(self._rooms)

    def put(self, room: int, dp_rank: int, now: float) -> None:
        """A request is there; an earlier one with this room is forgotten."""
        self._rooms.pop(room, None)
        self._rooms[room] = dp_rank, now + self._lifetime_s
        while len(self._rooms) > self._limit or self._oldest_until() <= now:
            del self._rooms[next(iter(self._rooms))]

    def find(self, rooms: list[int], now: float) -> dict[int, int]:
        """The ranks of those rooms that are known."""
        known = {room: self._rooms[room] for room in rooms if room in self._rooms}
        return {room: dp_rank for room, (dp_rank, until) in known.items() if now < until}

    def _oldest_until(self) -> float:
        return next(iter(self._rooms.values()))[1]
