"""Hands: a worker's threads with their lanes, and who may use a lane while its thread waits.

Everything here is called with the worker's lock held.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from mooncake_engine.errors import LaneError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mooncake_engine.batch import Batch
    from mooncake_engine.transport.base import Lane


class Hand:
    """One thread and its lane, or a guest's lane; fields are guarded by the worker's lock."""

    thread: threading.Thread  # a guest has none

    def __init__(self, lock: threading.Lock) -> None:
        self.lane: Lane | None = None
        self.batch: Batch | None = None
        self.spent = False  # the lane was interrupted or broke; it must not be used again
        self.work = threading.Condition(lock)
        self.called = False  # told to look, and not awake yet
        self.lent = False  # a caller moves slices on the lane, so the thread must not
        self.used = False  # lent since the thread began to wait: the lane was not idle

    def call(self) -> None:
        """Let the thread look whether its waiting is over."""
        self.called = True
        self.work.notify()


class IdleHands:
    """Those whose threads wait for work and whose lanes nobody borrowed; the last used comes first.

    That one's lane and memory are the likeliest to be in a cache, and the rest may expire.
    """

    def __init__(self) -> None:
        self._waiting: list[Hand] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def wait(self, hand: Hand, wanted: Callable[[], bool], idle_s: float) -> bool:
        """Its thread waits until `wanted()`. False: the hand was of no use for `idle_s`."""
        if wanted():
            return True
        self._waiting.append(hand)
        try:
            while True:
                hand.called = hand.used = False
                woken = hand.work.wait(idle_s)
                if hand.lent:
                    continue  # who borrowed the lane gives it back, and calls when there is need
                if wanted():
                    return True
                if not woken and not hand.used:
                    return False
        finally:
            self._waiting.remove(hand)

    def call(self, count: int) -> None:
        """Wake `count` of the threads, as far as there are so many."""
        for hand in reversed(self._waiting):
            if count <= 0:
                return
            if not hand.called:
                hand.call()
                count -= 1

    def borrow(self) -> Hand | None:
        """A hand whose lane is open and good, for the calling thread to move slices on."""
        for hand in reversed(self._waiting):
            if hand.lane is not None and not hand.spent:
                self._waiting.remove(hand)
                hand.lent = True
                return hand
        return None

    def give_back(self, hand: Hand) -> None:
        """The borrower is done with the lane."""
        hand.lent, hand.used = False, True
        self._waiting.append(hand)


class Guests:
    """Lanes for callers who bring small batches, over links that are `prompt`.

    As many as there are callers at once: no thread has to give one of its own, and opening and
    closing them takes no time, so it is done under the lock.
    """

    def __init__(self, lock: threading.Lock, open_lane: Callable[[], Lane]) -> None:
        self._lock = lock
        self._open_lane = open_lane
        self._left = threading.Condition(lock)
        self._awaited = False  # somebody waits for them to leave
        self._inside: set[Hand] = set()
        self._free: list[Hand] = []

    def __iter__(self) -> Iterator[Hand]:
        """Those who move something."""
        return iter(self._inside)

    def enter(self) -> Hand | None:
        """A hand for the calling thread; None: no lane can be opened."""
        if self._free:
            hand = self._free.pop()
        else:
            hand = Hand(self._lock)
            try:
                hand.lane = self._open_lane()
            except LaneError:
                return None
        self._inside.add(hand)
        return hand

    def leave(self, hand: Hand) -> None:
        """The guest is done. Its lane serves the next one, unless it is spent."""
        self._inside.discard(hand)
        if self._awaited:
            self._left.notify_all()
        if not hand.spent:
            self._free.append(hand)
        elif hand.lane is not None:
            hand.lane.close()

    def see_out(self, timeout: float) -> None:
        """Wait until all have left, at most `timeout` seconds, and close their lanes."""
        self._awaited = True
        self._left.wait_for(lambda: not self._inside, timeout)
        for hand in self._free:
            if hand.lane is not None:
                hand.lane.close()
        self._free.clear()
