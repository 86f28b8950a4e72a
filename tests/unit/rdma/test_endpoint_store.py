"""Which endpoint is closed for a new one, against the algorithm as its authors wrote it."""

from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mooncake_engine.transport.rdma.endpoint_store import EndpointStore

Policy = Literal["SIEVE", "FIFO"]


class Held:
    """Something that can be in use."""

    def __init__(self, name: int, *, pinned: bool = False) -> None:
        self.name = name
        self.pinned = pinned

    def __repr__(self) -> str:
        return f"{self.name}{'!' if self.pinned else ''}"


class Sieve:
    """SIEVE of Zhang et al., NSDI 2024, algorithm 1, on a list whose end is the tail (oldest)."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.queue: list[int] = []
        self.visited: set[int] = set()
        self.hand: int | None = None

    def request(self, key: int) -> int | None:
        """Returns the key that was evicted."""
        if key in self.queue:
            self.visited.add(key)
            return None
        victim = self.evict() if len(self.queue) == self.capacity else None
        self.queue.insert(0, key)
        return victim

    def evict(self) -> int:
        at = self.hand if self.hand is not None else self.queue[-1]
        while at in self.visited:
            self.visited.remove(at)
            place = self.queue.index(at)
            at = self.queue[place - 1] if place else self.queue[-1]
        place = self.queue.index(at)
        self.hand = self.queue[place - 1] if place else None
        self.queue.remove(at)
        return at


@given(st.integers(1, 6), st.lists(st.integers(0, 9), max_size=60))
def test_sieve_evicts_what_its_authors_would(capacity: int, wanted: list[int]) -> None:
    store: EndpointStore[int, Held] = EndpointStore(capacity, "SIEVE")
    model = Sieve(capacity)
    for key in wanted:
        evicted = [] if store.get(key) else store.add(key, Held(key))
        victim = model.request(key)
        assert [held.name for held in evicted] == ([] if victim is None else [victim])
        assert [held.name for held in store.values()] == model.queue[::-1]


@given(st.integers(1, 6), st.lists(st.integers(0, 9), max_size=60))
def test_fifo_evicts_the_oldest_however_much_it_is_used(capacity: int, wanted: list[int]) -> None:
    store: EndpointStore[int, Held] = EndpointStore(capacity, "FIFO")
    queue: list[int] = []
    for key in wanted:
        if store.get(key):
            continue
        evicted = [held.name for held in store.add(key, Held(key))]
        assert evicted == ([queue.pop(0)] if len(queue) == capacity else [])
        queue.append(key)


Step = tuple[str, int]
steps = st.lists(
    st.tuples(st.sampled_from(["add", "add", "get", "pin", "unpin", "remove"]), st.integers(0, 9)),
    max_size=80,
)


@given(st.integers(1, 6), st.sampled_from(["SIEVE", "FIFO"]), steps)
def test_what_is_in_use_stays_and_all_that_leaves_is_returned_once(
    capacity: int, policy: Policy, taken: list[Step]
) -> None:
    store: EndpointStore[int, Held] = EndpointStore(capacity, policy)
    held: dict[int, Held] = {}
    for step, key in taken:
        if step == "add":
            new = Held(key)
            before = held.pop(key, None)
            evicted = store.add(key, new)
            assert (before in evicted) == (before is not None)
            for old in evicted:
                if old is not before:
                    assert not old.pinned
                    assert held.pop(old.name) is old
            assert len(held) < capacity or all(old.pinned for old in held.values())
            held[key] = new
        elif step == "get":
            assert store.get(key) is held.get(key)
        elif step == "remove":
            assert not store.remove(key, Held(key))  # another one of that key
            assert store.remove(key, held[key] if key in held else Held(key)) == (key in held)
            held.pop(key, None)
        elif key in held:
            held[key].pinned = step == "pin"
        assert store.values() == list(held.values())
        assert len(store) == len(held)
        assert store.excess == max(0, len(held) - capacity)


def test_an_endpoint_that_is_used_outlives_a_crowd_that_is_used_once() -> None:
    stores: dict[Policy, EndpointStore[int, Held]] = {
        "SIEVE": EndpointStore(4, "SIEVE"),
        "FIFO": EndpointStore(4, "FIFO"),
    }
    for store in stores.values():
        store.add(0, Held(0))
        for key in range(1, 100):
            store.get(0)
            store.add(key, Held(key))
    assert stores["SIEVE"].get(0)
    assert not stores["FIFO"].get(0)


@pytest.mark.parametrize("policy", ["SIEVE", "FIFO"])
def test_a_store_that_grew_shrinks_when_its_endpoints_are_idle_again(policy: Policy) -> None:
    store: EndpointStore[int, Held] = EndpointStore(2, policy)
    busy = [Held(key, pinned=True) for key in range(5)]
    assert [store.add(held.name, held) for held in busy] == [[]] * 5
    assert store.excess == 3
    for held in busy:
        held.pinned = False
    assert store.add(9, Held(9)) == busy[:4]
    assert store.excess == 0
