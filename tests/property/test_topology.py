"""What holds for every machine, and for every set of measured pairs."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mooncake_engine.topology import (
    Gpu,
    Machine,
    Measured,
    Nic,
    Node,
    load_matrix,
    matchings,
    matrix,
    nics_for,
    to_json,
)

names = st.lists(st.sampled_from([f"mlx5_{n}" for n in range(12)]), unique=True)
buses = st.sampled_from(["pci0000:10", "pci0000:20"])
paths = st.one_of(
    st.just(()),
    st.tuples(buses),
    st.tuples(buses, st.sampled_from(["0000:10:01.0", "0000:10:02.0"]), st.just("0000:11:00.0")),
)


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    numas = st.integers(-1, 4)  # of which 3 and 4 are not there
    nics = tuple(Nic(name, "", draw(numas), draw(paths)) for name in draw(names))
    gpus = tuple(Gpu(n, "", draw(numas), draw(paths)) for n in range(draw(st.integers(0, 3))))
    distances = {n: {m: draw(st.integers(11, 13)) for m in range(3)} | {n: 10} for n in range(3)}
    return Machine(nics, gpus, tuple(Node(n, frozenset(), distances[n]) for n in range(3)))


@given(machines(), st.data())
def test_each_row_has_each_nic_once_and_none_that_is_excluded(
    machine: Machine, data: st.DataObject
) -> None:
    there = [nic.name for nic in machine.nics]
    some = st.lists(st.sampled_from(there), unique=True) if there else st.just([])
    only, excluded = data.draw(some), data.draw(some)
    rows = matrix(machine, only, excluded)
    wanted = [name for name in there if name not in excluded and (not only or name in only)]
    assert set(rows) == {f"cpu:{n}" for n in range(3)} | {f"cuda:{g.index}" for g in machine.gpus}
    for row in rows.values():
        assert sorted(row.all()) == sorted(wanted)
        assert bool(row.preferred) == bool(wanted)
    for location in (*rows, "cpu", "cuda:99", "*"):
        assert sorted(nics_for(rows, location).all()) == sorted(wanted)
        assert bool(nics_for(rows, location).preferred) == bool(wanted)
    if wanted:
        assert load_matrix(to_json(rows)) == rows


def pair(ours: str, theirs: str, bandwidth: float = 1000.0, latency: float = 5.0) -> Measured:
    return Measured(ours, theirs, 0, 0, bandwidth, latency)


@given(
    st.integers(1, 4), st.integers(1, 4), st.data()
)  # 4 x 4 has 24 assignments, which can all be tried
def test_no_other_assignment_is_better(rows: int, columns: int, data: st.DataObject) -> None:
    cost = st.floats(0.1, 100.0)
    at = {
        (ours, theirs): pair(f"a{ours}", f"x{theirs}", data.draw(cost), data.draw(cost))
        for ours, theirs in itertools.product(range(rows), range(columns))
    }
    found = matchings(list(at.values()))["0-0"]
    assert len(found) == min(rows, columns)
    assert len({p.src_dev for p in found}) == len({p.dst_dev for p in found}) == len(found)
    small, large = sorted((rows, columns))
    best = min(
        sum(
            at[(n, m) if rows <= columns else (m, n)].piece_us()
            for n, m in zip(range(small), order, strict=True)
        )
        for order in itertools.permutations(range(large), small)
    )
    assert sum(p.piece_us() for p in found) == pytest.approx(best)


@given(st.sets(st.tuples(st.sampled_from("abcd"), st.sampled_from("wxyz")), min_size=1))
def test_pairs_that_were_not_measured_are_never_chosen(measured: set[tuple[str, str]]) -> None:
    found = matchings([pair(*names) for names in measured])
    chosen = [(p.src_dev, p.dst_dev) for group in found.values() for p in group]
    assert set(chosen) <= measured
    assert sorted({ours for ours, _ in measured}) == sorted(ours for ours, _ in chosen)
