"""Every path through the session tables, and random walks along them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake_connector.session import (
    FETCH_TABLE,
    HOLD_TABLE,
    FetchAction,
    FetchEvent,
    FetchState,
    HoldAction,
    HoldEvent,
    HoldState,
    step,
)

READS = {event for event in FetchEvent if event.name.startswith("READ_")}
REPORTS = {FetchAction.REPORT_RECEIVED, FetchAction.REPORT_FAILED}


def can_end(table: dict, ended: object) -> set:
    reaching = {ended}
    while True:
        more = {state for (state, _), (after, _) in table.items() if after in reaching} - reaching
        if not more:
            return reaching
        reaching |= more


def test_every_hold_state_has_a_way_to_the_end() -> None:
    assert can_end(HOLD_TABLE, HoldState.ENDED) == set(HoldState)


def test_every_fetch_state_has_a_way_to_the_end() -> None:
    assert can_end(FETCH_TABLE, FetchState.ENDED) == set(FetchState)


@pytest.mark.parametrize("event", [FetchEvent.GIVE_UP, FetchEvent.ABORT, FetchEvent.PEER_LOST])
def test_timeout_abort_and_a_lost_peer_end_a_fetch_from_any_state(event: FetchEvent) -> None:
    for state in set(FetchState) - {FetchState.ENDED}:
        after, _ = step(FETCH_TABLE, state, event)
        after, _ = step(FETCH_TABLE, after, FetchEvent.READ_FAILED)
        assert after is FetchState.ENDED, state


def test_reuse_and_timeout_stop_a_hold_from_being_served_in_any_state() -> None:
    for state in (HoldState.COMPUTING, HoldState.HELD):
        for event in (HoldEvent.TIMEOUT, HoldEvent.REUSE):
            after, actions = step(HOLD_TABLE, state, event)
            assert after in (HoldState.LEFT, HoldState.ENDED)
            assert actions[0] is HoldAction.END_GRANT


@given(st.lists(st.sampled_from(HoldEvent), max_size=30))
def test_a_hold_frees_once_and_only_what_was_held(events: list[HoldEvent]) -> None:
    state, actions, was_held = HoldState.COMPUTING, [], False
    for event in events:
        before = state
        state, new = step(HOLD_TABLE, state, event)
        was_held |= event is HoldEvent.HOLD and before is not HoldState.ENDED
        actions.extend(new)
        if HoldAction.REPORT_SENT in new:
            assert was_held
            assert HoldAction.END_GRANT in actions
    assert actions.count(HoldAction.REPORT_SENT) <= 1
    assert actions.count(HoldAction.END_GRANT) <= 1
    if state is HoldState.ENDED and was_held:
        assert actions.count(HoldAction.REPORT_SENT) == 1


@given(st.lists(st.sampled_from(FetchEvent), max_size=40))
def test_a_fetch_is_reported_once_and_never_while_it_reads(events: list[FetchEvent]) -> None:
    state, reports, reading = FetchState.WAITING, 0, False
    for event in events:
        if event in READS and not reading:
            continue  # a batch that does not run cannot complete
        if event in READS:
            reading = False
        state, actions = step(FETCH_TABLE, state, event)
        for action in actions:
            if action is FetchAction.READ:
                assert not reading, "one batch at a time"
                reading = True
            if action in REPORTS:
                assert not reading
                reports += 1
            if action is FetchAction.SUBSCRIBE_ANEW:
                assert not reading
    assert reports == (state is FetchState.ENDED)


@given(st.lists(st.sampled_from(FetchEvent), max_size=40))
def test_a_fetch_is_never_received_without_a_verdict_of_held_or_an_abort(
    events: list[FetchEvent],
) -> None:
    state = FetchState.WAITING
    for index, event in enumerate(events):
        state, actions = step(FETCH_TABLE, state, event)
        if FetchAction.REPORT_RECEIVED in actions:
            assert event is FetchEvent.HELD or FetchEvent.ABORT in events[: index + 1]
