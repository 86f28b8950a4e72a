"""Hands: a worker's threads with their lanes, and who may use a lane while its thread waits.

Everything here is called with the worker's lock held.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from mooncake_engine.batch import Batch
    from mooncake_engine.transport.base import Lane


class Hand:
    """One thread and its lane; fields are guarded by the worker's lock."""

    thread: threading.Thread

    def __init__(self, lock: threading.Lock) -> None:
        self.lane: Lane | None = None
        self.batch: Batch | None = None
        self.spent = False  # the lane was interrupted or broke; it must not be used again
        self.work = threading.Condition(lock)
        self.called = False  # told to look, and not awake yet
        self.lent = False  # a caller moves slices on the lane, so the thread must not
        self.alone = False  # a slice that is no batch's
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
                hand.lent = hand.lane.hurry = True
                return hand
        return None

    def give_back(self, hand: Hand) -> None:
        """The borrower is done with the lane."""
        hand.lent, hand.used = False, True
        if hand.lane is not None:
            hand.lane.hurry = False
        self._waiting.append(hand)
