"""Room in a send queue of the pyverbs binding, and what is said where there is no pyverbs."""

from __future__ import annotations

import importlib.util
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mooncake_engine.transport.rdma.verbs import load
from mooncake_engine.transport.rdma.verbs.base import VerbsMissing
from mooncake_engine.transport.rdma.verbs.pyverbs_slots import Slots

TOTAL = 20


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("post"), st.integers(1, TOTAL), st.integers(1, 30)),
            st.tuples(st.just("refused"), st.integers(1, TOTAL), st.integers(1, 30)),
            st.tuples(st.just("complete"), st.just(0), st.just(0)),
        ),
        max_size=60,
    )
)
def test_a_place_is_free_again_when_a_completion_shows_it(
    steps: list[tuple[str, int, int]],
) -> None:
    """Against the queue itself: whether each request in it is signalled, oldest first."""
    slots, queue = Slots(TOTAL), deque[bool]()
    for what, wanted, every in steps:
        count = min(wanted, slots.free)
        if what == "complete" and queue:
            while not queue.popleft():
                pass
            slots.succeeded()
        elif what != "complete" and count:
            slots.take(count, every)
            if what == "refused":
                slots.give_back(count, every)
            else:
                queue.extend((row + 1) % every == 0 or row + 1 == count for row in range(count))
        assert slots.free == TOTAL - len(queue)


def test_each_failed_request_frees_one_place_and_receives_free_no_more_than_there_are() -> None:
    slots = Slots(TOTAL)
    slots.take(TOTAL, 7)
    for left in range(1, TOTAL + 1):
        slots.failed()
        assert slots.free == left
    slots.failed()  # a receive's, flushed too
    assert slots.free == TOTAL


@pytest.mark.skipif(
    importlib.util.find_spec("pyverbs") is not None, reason="tells what is said without pyverbs"
)
def test_a_missing_pyverbs_says_what_to_install() -> None:
    with pytest.raises(VerbsMissing, match="apt-get install python3-pyverbs"):
        load("pyverbs")
