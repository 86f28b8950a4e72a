"""Exactly one completion per batch, whatever happens to its slices, and in whatever order."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from mooncake_engine import Completion, Op, Path, Status
from mooncake_engine.batch import Batch, Failure, Progress
from mooncake_engine.slicing import Plan, cut, descriptors


def slices_of(count: int) -> list:
    runs = descriptors([(1, 1, count)], None, None) if count else descriptors([], None, None)
    return cut(Op.READ, runs, b"", 1)


class ABatchEndsOnce(RuleBasedStateMachine):
    """Lanes take and return slices; anybody stops the batch at any time."""

    @initialize(count=st.integers(1, 5))
    def submit(self, count: int) -> None:
        self.progress = Progress(slices_of(count))
        self.moving = 0
        self.ends = 0
        self.first: Failure | None = None

    @precondition(lambda self: self.progress.waiting)
    @rule()
    def take(self) -> None:
        self.progress.take()
        self.moving += 1

    @precondition(lambda self: self.moving)
    @rule(status=st.sampled_from(Status))
    def give_back(self, status: Status) -> None:
        failure = None if status is Status.OK else Failure(status, "a lane said so")
        self.moving -= 1
        self.first = self.first or failure
        self.ends += self.progress.returned(failure)

    @rule(status=st.sampled_from([Status.CANCELLED, Status.TIMED_OUT]))
    def stop(self, status: Status) -> None:
        failure = Failure(status, "somebody stopped it")
        if not self.progress.ended:
            self.first = self.first or failure
        self.ends += self.progress.stop(failure)

    @invariant()
    def it_ends_once_when_nothing_waits_or_moves_and_for_the_first_reason(self) -> None:
        if not hasattr(self, "progress"):
            return
        ended = not self.progress.waiting and not self.moving
        assert self.progress.ended == ended
        assert self.ends == int(ended)
        assert self.progress.failure == self.first


TestABatchEndsOnce = ABatchEndsOnce.TestCase


@given(st.lists(st.sampled_from(["callback", "bad callback", "poll"]), max_size=6), st.booleans())
def test_every_callback_hears_of_the_end_once(asked: list[str], fails: bool) -> None:
    bookkeeping: list[Completion] = []
    heard: list[Completion] = []
    runs = descriptors([(1, 2, 3)], None, None)
    batch = Batch(
        Plan(Op.READ, runs, slices_of(1), 3, 1),
        Path("loopback", "test"),
        1.0,
        lambda _batch, _failure: None,
        lambda _batch, end: bookkeeping.append(end),
    )

    def raise_after(end: Completion) -> None:
        heard.append(end)
        raise RuntimeError("a caller's bug")

    def ask(what: str) -> None:
        if what == "poll":
            assert (batch.poll() is None) == (not bookkeeping)
        else:
            batch.add_done_callback(heard.append if what == "callback" else raise_after)

    half = len(asked) // 2
    for what in asked[:half]:
        ask(what)
    assert heard == []
    batch.finish(Failure(Status.FAILED, "x") if fails else None)
    for what in asked[half:]:
        ask(what)
    end = batch.wait(0)
    assert bookkeeping == [end]
    assert heard == [end] * sum(what != "poll" for what in asked)
    assert end.ok is not fails
    assert np.isfinite(end.total_s)
