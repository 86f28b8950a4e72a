"""How many endpoints stay open, and which is closed for a new one: SIEVE, or first in first out.

SIEVE (Zhang et al., NSDI 2024) is one queue, a bit in each entry that a use sets, and a hand that
goes from the oldest to the newest: it takes the bit from those that have it and stops at the first
that has none. So what is used stays, a use costs one bit, and what was never used again is gone
soon. Pure; the caller locks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, Literal, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable


class Pinnable(Protocol):
    """What can be stored."""

    @property
    def pinned(self) -> bool:
        """It is in use and must not be closed now."""


K = TypeVar("K", bound="Hashable")
V = TypeVar("V", bound=Pinnable)


class _Entry(Generic[K, V]):
    """A place in the queue."""

    __slots__ = ("key", "newer", "older", "used", "value")

    def __init__(self, key: K, value: V, older: _Entry[K, V] | None) -> None:
        self.key = key
        self.value = value
        self.used = False
        self.older = older
        self.newer: _Entry[K, V] | None = None


class EndpointStore(Generic[K, V]):
    """Values by key, at most `capacity` of them unless more are in use."""

    def __init__(self, capacity: int, policy: Literal["SIEVE", "FIFO"]) -> None:
        """Args: capacity: at least 1."""
        self.capacity = capacity
        self._sieve = policy == "SIEVE"
        self._entries: dict[K, _Entry[K, V]] = {}
        self._oldest: _Entry[K, V] | None = None
        self._newest: _Entry[K, V] | None = None
        self._hand: _Entry[K, V] | None = None  # where SIEVE goes on; None: at the oldest

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def excess(self) -> int:
        """Entries over capacity, because all were in use; the next `add` tries again."""
        return max(0, len(self._entries) - self.capacity)

    def get(self, key: K) -> V | None:
        """The value of a key, which counts as its use."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        entry.used = True
        return entry.value

    def add(self, key: K, value: V) -> list[V]:
        """Store a value; returns those that had to leave for it, to be closed by the caller.

        The one that the key had before is always among them, in use or not. Where all are in use
        the store grows instead (`excess`).
        """
        evicted = []
        before = self._entries.get(key)
        if before is not None:
            self._unlink(before)
            evicted.append(before.value)
        while len(self._entries) >= self.capacity and (victim := self._victim()) is not None:
            self._unlink(victim)
            evicted.append(victim.value)
        entry = self._entries[key] = _Entry(key, value, self._newest)
        if self._newest is None:
            self._oldest = entry
        else:
            self._newest.newer = entry
        self._newest = entry
        return evicted

    def remove(self, key: K, value: V) -> bool:
        """Forget a value that ended by itself; False when the key has another one, or none."""
        entry = self._entries.get(key)
        if entry is None or entry.value is not value:
            return False
        self._unlink(entry)
        return True

    def values(self) -> list[V]:
        """All, oldest first."""
        return [entry.value for entry in self._entries.values()]

    def _victim(self) -> _Entry[K, V] | None:
        """The entry to evict, None when all are in use. Moves SIEVE's hand."""
        entry = self._hand
        for _ in range(2 * len(self._entries)):  # the first round may only have cleared bits
            entry = entry or self._oldest
            assert entry is not None, "there are entries, so one is the oldest"
            if not entry.value.pinned:
                if not (self._sieve and entry.used):
                    return entry
                entry.used = False
            entry = entry.newer
            if self._sieve:
                self._hand = entry
        return None

    def _unlink(self, entry: _Entry[K, V]) -> None:
        del self._entries[entry.key]
        if entry.older is None:
            self._oldest = entry.newer
        else:
            entry.older.newer = entry.newer
        if entry.newer is None:
            self._newest = entry.older
        else:
            entry.newer.older = entry.older
        if self._hand is entry:
            self._hand = entry.newer
