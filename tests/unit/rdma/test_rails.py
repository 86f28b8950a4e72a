"""Which pairs of NICs carry a slice, and which rest."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from mooncake_engine.topology import Priority
from mooncake_engine.transport.rdma.rails import Rail, Rails, share

if TYPE_CHECKING:
    from collections.abc import Callable

PAUSE, WINDOW = 30.0, 10.0


def names(count: int) -> tuple[str, ...]:
    return tuple(f"mlx5_{i}" for i in range(count))


def rails(
    ours: int = 2,
    theirs: int = 2,
    *,
    near: int | None = None,
    their_near: int | None = None,
    threshold: int = 1,
    affinity: bool = False,
    window: float = WINDOW,
    **others: Any,  # noqa: ANN401 - of Rails, each of another type
) -> Rails:
    """NICs mlx5_0.. on either side, of which the first `near` are preferred."""

    def row(count: int, preferred: int | None) -> dict[str, Priority]:
        preferred = count if preferred is None else preferred
        return {"cpu:0": Priority(names(count)[:preferred], names(count)[preferred:])}

    return Rails(
        others.pop("local_names", names(ours)),
        others.pop("remote_names", names(theirs)),
        others.pop("local_matrix", row(ours, near)),
        others.pop("remote_matrix", row(theirs, their_near)),
        dest_affinity=affinity,
        pause_s=PAUSE,
        error_threshold=threshold,
        error_window_s=window,
        **others,
    )


def chosen(table: Rails, now: float = 0.0) -> tuple[Rail, ...]:
    return table.choose("cpu", "cpu", now)


def end_up_with(table: Rails, works: Callable[[Rail], bool]) -> tuple[tuple[Rail, ...], int]:
    """The rails in use when all that do not work were found out, and how many failures it took."""
    failures = 0
    while True:
        dead = [rail for rail in chosen(table) if not works(rail)]
        if not dead:
            return chosen(table), failures
        for rail in dead:
            table.failed(rail, 0.0)
        failures += len(dead)


sizes = st.integers(1, 9)


# Which rails are preferred.


@given(sizes, sizes, st.data(), st.booleans())
def test_each_pair_of_nics_is_in_one_tier_and_nearer_ones_go_before_farther_ones(
    ours: int, theirs: int, data: st.DataObject, affinity: bool
) -> None:
    near, their_near = data.draw(st.integers(1, ours)), data.draw(st.integers(1, theirs))
    table = rails(ours, theirs, near=near, their_near=their_near, affinity=affinity)
    tiers = table.tiers("cpu", "cpu")
    assert all(tiers)
    assert sorted(itertools.chain(*tiers)) == [
        Rail(*pair) for pair in itertools.product(range(ours), range(theirs))
    ]
    assert chosen(table) == tiers[0]
    distances = [
        {(rail.local >= near, rail.remote >= their_near) for rail in tier} for tier in tiers
    ]
    if not affinity:
        assert all(len(distance) == 1 for distance in distances)
        assert [min(d) for d in distances] == sorted(min(d) for d in distances)


@given(sizes, sizes)
def test_every_near_nic_has_work_and_none_more_than_it_must(ours: int, theirs: int) -> None:
    first = chosen(rails(ours + 2, theirs + 3, near=ours, their_near=theirs))
    assert len(first) == max(ours, theirs)
    for count, used in (ours, [r.local for r in first]), (theirs, [r.remote for r in first]):
        load = Counter(used)
        assert set(load) == set(range(count))
        assert max(load.values()) - min(load.values()) <= 1


def test_as_many_nics_here_as_there_make_disjoint_pairs() -> None:
    assert chosen(rails(8, 8)) == tuple(Rail(i, i) for i in range(8))


def test_memory_on_another_numa_node_has_other_rails() -> None:
    matrix = {
        "cpu:0": Priority(("mlx5_0",), ("mlx5_1",)),
        "cpu:1": Priority(("mlx5_1",), ("mlx5_0",)),
    }
    table = rails(local_matrix=matrix, remote_matrix=matrix)
    assert table.choose("cpu:0", "cpu:0", 0.0) == (Rail(0, 0),)
    assert table.choose("cpu:1", "cpu:0", 0.0) == (Rail(1, 0),)
    assert table.choose("cpu", "cpu:1", 0.0) == (Rail(0, 1), Rail(1, 1))


def test_nics_that_a_matrix_names_and_nobody_opened_are_not_used() -> None:
    matrix = {"cpu:0": Priority(("mlx5_9", "mlx5_1"), ("mlx5_8", "mlx5_0"))}
    table = rails(local_matrix=matrix, remote_matrix={})
    assert table.tiers("cpu", "cpu") == (
        (Rail(1, 0), Rail(1, 1)),
        (Rail(0, 0), Rail(0, 1)),
    )


def test_without_a_matrix_all_nics_are_alike() -> None:
    table = rails(3, 3, local_matrix={}, remote_matrix={"cuda:0": Priority(("x",), ("y",))})
    assert chosen(table) == (Rail(0, 0), Rail(1, 1), Rail(2, 2))


@pytest.mark.parametrize("affinity", [False, True])
def test_a_peer_without_nics_has_no_rails(affinity: bool) -> None:
    assert chosen(rails(2, 0, affinity=affinity)) == ()


def test_a_nic_that_a_peer_lists_twice_counts_once() -> None:
    matrix = {"cpu:0": Priority(("mlx5_0", "mlx5_0"), ("mlx5_0", "mlx5_1"))}
    table = rails(1, 2, remote_matrix=matrix)
    assert table.tiers("cpu", "cpu") == ((Rail(0, 0),), (Rail(0, 1),))


def test_measured_pairs_go_before_all_others() -> None:
    measured = {("cpu:0", "cpu:0"): [(0, 1), (1, 0)]}
    table = rails(pairs=measured)
    assert table.choose("cpu:0", "cpu:0", 0.0) == (Rail(0, 1), Rail(1, 0))
    assert table.choose("cpu:0", "cpu:1", 0.0) == (Rail(0, 0), Rail(1, 1))
    for rail in Rail(0, 1), Rail(1, 0):
        table.failed(rail, 0.0)
    assert table.choose("cpu:0", "cpu:0", 0.0) == (Rail(0, 0), Rail(1, 1))


def test_with_affinity_each_nic_goes_to_its_namesake_also_where_that_is_farther() -> None:
    table = rails(
        local_names=("a", "b", "c"),
        remote_names=("x", "c", "b"),
        local_matrix={"cpu:0": Priority(("a", "b", "c"), ())},
        remote_matrix={"cpu:0": Priority(("x", "c"), ("b",))},
        affinity=True,
    )
    assert chosen(table) == (Rail(0, 0), Rail(1, 2), Rail(2, 1))


def test_a_nic_without_a_namesake_shares_one_when_all_near_ones_have_theirs() -> None:
    table = rails(
        local_names=("a", "b"),
        remote_names=("x", "b"),
        remote_matrix={"cpu:0": Priority(("b",), ("x",))},
        local_matrix={},
        affinity=True,
    )
    assert chosen(table) == (Rail(0, 1), Rail(1, 1))


# What fails.


@given(st.integers(2, 9), st.data())
def test_a_dead_nic_costs_one_failure_and_the_others_go_on_without_it(
    count: int, data: st.DataObject
) -> None:
    dead = data.draw(st.integers(0, count - 1))
    mine = data.draw(st.booleans())
    left, failures = end_up_with(rails(count, count), lambda rail: rail[0 if mine else 1] != dead)
    assert failures == 1
    assert left == tuple(Rail(i, i) for i in range(count) if i != dead)


@given(sizes, sizes, st.data())
def test_while_one_rail_works_it_is_used_unless_its_nics_failed_with_two_others(
    ours: int, theirs: int, data: st.DataObject
) -> None:
    pairs = [Rail(*pair) for pair in itertools.product(range(ours), range(theirs))]
    working = set(data.draw(st.lists(st.sampled_from(pairs))))
    table = rails(ours, theirs)
    left, _ = end_up_with(table, working.__contains__)
    tiers = table.tiers("cpu", "cpu")
    if left:
        assert set(left) <= working
        assert any(set(left) <= set(tier) for tier in tiers)
        return
    tried = [rail for rail in pairs if rail not in working]
    for rail in working:
        tier = next(place for place, tier in enumerate(tiers) if rail in tier)
        failed = [
            one
            for one in itertools.chain(*tiers[:tier])
            if one in tried and (one.local == rail.local or one.remote == rail.remote)
        ]
        assert len(failed) >= 2


@pytest.mark.parametrize("near", [8, 4, 6])
def test_a_dead_switch_is_found_out_in_a_few_rounds(near: int) -> None:
    table = rails(8, 8, near=near, their_near=near)
    left, failures = end_up_with(table, lambda _: False)
    assert left == ()
    assert failures == 16  # each NIC with two partners; 64 pairs would be 8 time-outs in a row
    assert all(
        table.state(Rail(*pair), 1.0) == "cooling" for pair in itertools.product(range(8), range(8))
    )
    # The way back may be any of them.
    assert len(table.probes(PAUSE)) == 64
    table.succeeded(Rail(5, 2), PAUSE)
    assert chosen(table, PAUSE) == (Rail(5, 2),)


def test_farther_nics_are_used_only_when_no_nearer_one_is_left() -> None:
    table = rails(2, 2, near=1, their_near=1)
    assert chosen(table) == (Rail(0, 0),)
    table.failed(Rail(0, 0), 0.0)
    assert chosen(table) == (Rail(0, 1),)
    table.failed(Rail(0, 1), 0.0)  # the second failure of our mlx5_0
    assert chosen(table) == (Rail(1, 0),)
    table.failed(Rail(1, 0), 0.0)
    assert chosen(table) == (Rail(1, 1),)


def test_a_rail_fails_by_as_many_errors_within_the_window_as_are_too_many() -> None:
    table, rail = rails(threshold=3), Rail(0, 0)
    for now in (0.0, 1.0, WINDOW + 0.5):  # three, but never three within the window
        table.failed(rail, now)
    assert rail in chosen(table, WINDOW + 0.5)
    table.succeeded(rail, WINDOW + 0.6)  # an error now and then counts in spite of successes
    table.failed(rail, WINDOW + 0.7)
    assert rail not in chosen(table, WINDOW + 0.7)
    assert table.state(rail, WINDOW + 0.7) == "cooling"


def test_a_rail_that_was_proven_again_starts_with_no_errors() -> None:
    table, rail = rails(threshold=2, window=2 * PAUSE), Rail(0, 0)
    table.failed(rail, 0.0)
    table.failed(rail, 1.0)
    assert table.probes(1.0 + PAUSE) == (rail,)
    table.succeeded(rail, 1.0 + PAUSE)
    table.failed(rail, 1.0 + PAUSE)
    assert table.state(rail, 1.0 + PAUSE) == "up"


def test_a_rail_that_is_forgiven_is_as_one_that_never_failed() -> None:
    table, rail = rails(1, 1, threshold=2), Rail(0, 0)
    for errors in (1, 2, 1):
        for _ in range(errors):
            table.failed(rail, 0.0)
        table.forgive(rail)
        assert chosen(table) == (rail,)
        assert table.probes(2 * PAUSE) == ()


def test_successes_of_what_was_sent_before_the_failure_prove_nothing() -> None:
    table, rail = rails(), Rail(0, 0)
    table.failed(rail, 0.0)
    table.succeeded(rail, 0.1)
    assert table.state(rail, 0.1) == "cooling"


def test_failures_of_what_was_sent_before_the_failure_do_not_make_the_pause_longer() -> None:
    table, rail = rails(), Rail(0, 0)
    table.failed(rail, 0.0)
    table.failed(rail, PAUSE - 1)
    assert table.probes(PAUSE) == (rail,)


def test_a_probe_that_nobody_reports_on_is_given_to_the_next_after_a_pause() -> None:
    table, rail = rails(), Rail(0, 0)
    table.failed(rail, 0.0)
    assert table.probes(PAUSE - 0.1) == ()
    assert table.probes(PAUSE) == (rail,)
    assert table.probes(PAUSE + 1) == ()
    assert table.probes(2 * PAUSE) == (rail,)


class RailLives(RuleBasedStateMachine):
    """Rails under anything that can happen, against a table of what each has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.table = rails(2, 3, near=1)
        self.rested_since: dict[Rail, float] = {}  # those that nobody may use
        self.given: dict[Rail, float] = {}

    pairs = st.builds(Rail, st.integers(0, 1), st.integers(0, 2))

    @rule(seconds=st.floats(0.1, 50.0))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(rail=pairs)
    def fails(self, rail: Rail) -> None:
        self.table.failed(rail, self.now)
        if rail not in self.rested_since or self.now >= self.rested_since[rail] + PAUSE:
            self.rested_since[rail] = self.now
            self.given.pop(rail, None)

    @rule(rail=pairs)
    def succeeds(self, rail: Rail) -> None:
        self.table.succeeded(rail, self.now)
        if rail in self.rested_since and self.now >= self.rested_since[rail] + PAUSE:
            del self.rested_since[rail]
            self.given.pop(rail, None)

    @rule()
    def choose(self) -> None:
        usable = chosen(self.table, self.now)
        assert not set(usable) & set(self.rested_since)
        assert len(set(usable)) == len(usable)
        assert any(set(usable) <= set(tier) for tier in self.table.tiers("cpu", "cpu"))
        for rail in itertools.chain(*self.table.tiers("cpu", "cpu")):
            if self.table.state(rail, self.now) != "up":  # it may have rested some more
                self.rested_since.setdefault(rail, self.now)

    @rule()
    def probe(self) -> None:
        for rail in self.table.probes(self.now):
            assert self.now >= self.rested_since[rail] + PAUSE
            assert self.now >= self.given.get(rail, 0.0) + PAUSE
            self.given[rail] = self.now

    @precondition(lambda self: self.rested_since)
    @rule()
    def all_is_well_again(self) -> None:
        self.now += 2 * PAUSE
        assert set(self.table.probes(self.now)) == set(self.rested_since)
        for rail in self.rested_since:
            self.table.succeeded(rail, self.now)
        self.rested_since.clear()
        self.given.clear()
        assert chosen(self.table, self.now) == self.table.tiers("cpu", "cpu")[0]

    @invariant()
    def what_rests_is_said_to_rest(self) -> None:
        for rail in itertools.chain(*self.table.tiers("cpu", "cpu")):
            since = self.rested_since.get(rail)
            state = self.table.state(rail, self.now)
            if since is None:
                assert state == "up"
            else:
                assert state == ("cooling" if self.now < since + PAUSE else "probing")


TestRailLives = RailLives.TestCase
TestRailLives.settings = settings(deadline=None, derandomize=True, stateful_step_count=30)


# Sharing.


@given(st.integers(0, 300), st.integers(1, 9), st.integers(0, 1000))
def test_requests_are_shared_evenly_and_in_order(count: int, ways: int, turn: int) -> None:
    table = [Rail(i, i) for i in range(ways)]
    shares = share(count, table, turn=turn) if count else []
    rows = [row for _, part in shares for row in range(part.start, part.stop)]
    assert rows == list(range(count))
    lengths = [part.stop - part.start for _, part in shares]
    assert all(lengths)
    assert lengths == sorted(lengths, reverse=True)
    assert max(lengths, default=0) - min(lengths, default=0) <= 1
    assert len({rail for rail, _ in shares}) == len(shares) == min(count, ways)


def test_small_slices_take_turns_with_the_rails() -> None:
    table = [Rail(i, i) for i in range(4)]
    firsts = [share(1, table, turn=turn)[0][0] for turn in range(8)]
    assert firsts == [*table, *table]
