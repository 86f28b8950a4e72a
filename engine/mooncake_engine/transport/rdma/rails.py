"""Which pairs of NICs (rails) to one peer carry a slice, and which of them rest. Pure.

The rails between two memory locations are sorted into tiers, and those of the first tier that has
a usable one share the work:

* the pairs that were measured, if any;
* near to both memories; then near to ours; then near to the peer's; then the others. Each of
  these is several tiers: in the first one of n NICs here and n there each is in one pair, in the
  next the peer's are turned by one, and so on. So when a NIC fails the others go on alone: a pair
  across would share a NIC with them, and on many networks there is no way across.

A rail that failed rests for `pause_s`, and then carries one request that proves it before it
carries others. When whole tiers have failed, a NIC that failed with two partners is not tried with
a third: of 8 NICs on either side of a dead switch each would cost a time-out with 8 others. Those
rails rest untried, and are probed like the others.

The caller locks; times are monotonic seconds.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from typing import TYPE_CHECKING, Literal, NamedTuple

from mooncake_engine.topology import Priority, narrow, nics_for

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from mooncake_engine.topology import Matrix

_PARTNERS = 2  # that a NIC failed with are enough

RailState = Literal["up", "cooling", "probing"]


class Rail(NamedTuple):
    """A way to a peer: our NIC and its NIC, by their places in the two lists of names."""

    local: int
    remote: int


Tiers = tuple[tuple[Rail, ...], ...]


class _Resting:
    """A rail that failed, or would have."""

    __slots__ = ("claimed_until", "tried", "until")

    def __init__(self, until: float, *, tried: bool) -> None:
        self.tried = tried
        self.until = until  # it may be probed then
        self.claimed_until = until  # somebody has the probe until then


class Rails:
    """The rails to one peer."""

    def __init__(
        self,
        local_names: Sequence[str],
        remote_names: Sequence[str],
        local_matrix: Matrix,
        remote_matrix: Matrix,
        *,
        pairs: Mapping[tuple[str, str], Iterable[tuple[int, int]]] | None = None,
        dest_affinity: bool,
        pause_s: float,
        error_threshold: int,
        error_window_s: float,
    ) -> None:
        """All up.

        Args:
            local_names: Our NICs, in the order of our keys.
            remote_names: The peer's, in the order of its keys.
            local_matrix: Which of ours are near to which memory.
            remote_matrix: Which of the peer's.
            pairs: (Our location, the peer's location) -> rails that were measured to be good.
            dest_affinity: Pair each of ours with the peer's of the same name where it has one.
            pause_s: How long a failed rail rests.
            error_threshold: So many failures within
            error_window_s: seconds are a failed rail.
        """
        self.local_names = tuple(local_names)
        self.remote_names = tuple(remote_names)
        self._local_matrix = narrow(local_matrix, local_names)
        self._remote_matrix = narrow(remote_matrix, remote_names)
        self._pairs = pairs or {}
        self._dest_affinity = dest_affinity
        self._pause_s = pause_s
        self._error_threshold = error_threshold
        self._error_window_s = error_window_s
        self._tiers: dict[tuple[str, str], Tiers] = {}
        self._errors: dict[Rail, deque[float]] = {}  # of rails that are up
        self._resting: dict[Rail, _Resting] = {}
        self._proven: set[Rail] = set()  # have worked since they last failed

    def choose(self, local_location: str, remote_location: str, now: float) -> tuple[Rail, ...]:
        """The rails that share a slice between these memories; empty when none is usable."""
        failures: Counter[tuple[int, int]] = Counter()  # by (0: ours, 1: the peer's; place)
        for tier in self.tiers(local_location, remote_location):
            awake = [rail for rail in tier if rail not in self._resting]
            usable = tuple(
                rail
                for rail in awake
                if rail in self._proven or max(failures[end] for end in enumerate(rail)) < _PARTNERS
            )
            if usable:
                return usable
            for rail in awake:
                self._rest(rail, now, tried=False)
            for rail in tier:
                if self._resting[rail].tried:
                    failures.update(enumerate(rail))
        return ()

    def probes(self, now: float) -> tuple[Rail, ...]:
        """Rails that have rested enough: one request may prove each. Each caller gets others.

        Who has one tells how it ended; who says nothing for `pause_s` has lost it to the next.
        """
        due = tuple(rail for rail, rest in self._resting.items() if rest.claimed_until <= now)
        for rail in due:
            self._resting[rail].claimed_until = now + self._pause_s
        return due

    def failed(self, rail: Rail, now: float) -> None:
        """A request could not be moved over this rail."""
        resting = self._resting.get(rail)
        if resting is not None:
            if now >= resting.until:  # it was the probe; before, what was under way fails as well
                self._rest(rail, now, tried=True)
            return
        errors = self._errors.setdefault(rail, deque(maxlen=self._error_threshold))
        errors.append(now)
        if len(errors) == self._error_threshold and now - errors[0] <= self._error_window_s:
            self._rest(rail, now, tried=True)

    def succeeded(self, rail: Rail, now: float) -> None:
        """Requests have moved over this rail."""
        resting = self._resting.get(rail)
        if resting is not None:
            if now < resting.until:  # it was sent before the failure
                return
            del self._resting[rail]
        self._proven.add(rail)

    def forgive(self, rail: Rail) -> None:
        """Take a rail for one that never failed."""
        self._resting.pop(rail, None)
        self._errors.pop(rail, None)

    def state(self, rail: Rail, now: float) -> RailState:
        """For people: "probing" has rested enough, and waits for its proof."""
        resting = self._resting.get(rail)
        if resting is None:
            return "up"
        return "cooling" if now < resting.until else "probing"

    def tiers(self, local_location: str, remote_location: str) -> Tiers:
        """All rails between these memories, best first; each is in one tier."""
        key = (local_location, remote_location)
        if key not in self._tiers:
            self._tiers[key] = self._sorted(key)
        return self._tiers[key]

    def _sorted(self, locations: tuple[str, str]) -> Tiers:
        ours = _places(nics_for(self._local_matrix, locations[0]), self.local_names)
        theirs = _places(nics_for(self._remote_matrix, locations[1]), self.remote_names)
        wanted = [[Rail(*pair) for pair in self._pairs.get(locations, ())]]
        if self._dest_affinity and theirs[0]:
            wanted.append(self._of_same_name(ours[0], theirs))
        for near, far in itertools.product(ours, theirs):
            wanted += _rounds(near, far)
        seen: set[Rail] = set()
        tiers = []
        for tier in wanted:
            tiers.append(tuple(dict.fromkeys(rail for rail in tier if rail not in seen)))
            seen.update(tier)
        return tuple(filter(None, tiers))

    def _of_same_name(self, ours: Sequence[int], theirs: Sequence[Sequence[int]]) -> list[Rail]:
        """Each of ours with its namesake, and those without one with the near ones left over."""
        place = {self.remote_names[nic]: nic for nics in theirs for nic in nics}
        named = {nic: place.get(self.local_names[nic]) for nic in ours}
        left = [nic for nic in theirs[0] if nic not in named.values()] or theirs[0]
        turn = itertools.cycle(left)
        return [Rail(nic, next(turn) if peer is None else peer) for nic, peer in named.items()]

    def _rest(self, rail: Rail, now: float, *, tried: bool) -> None:
        self._errors.pop(rail, None)
        self._proven.discard(rail)
        self._resting[rail] = _Resting(now + self._pause_s, tried=tried)


def share(count: int, rails: Sequence[Rail], *, turn: int) -> list[tuple[Rail, slice]]:
    """Which of `count` requests go over which rail: contiguous shares, the larger ones first.

    Args:
        count: How many requests there are.
        rails: At least one.
        turn: Which rail is first. Counted up by the caller, so that small slices spread too.
    """
    ways = min(count, len(rails))
    least, larger = divmod(count, ways)
    ends = [least * way + min(way, larger) for way in range(ways + 1)]
    return [
        (rails[(turn + way) % len(rails)], slice(first, end))
        for way, (first, end) in enumerate(itertools.pairwise(ends))
    ]


def _places(row: Priority, names: Sequence[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Places of the near NICs, and of the others."""
    if not row.preferred:  # the matrix names none of them for this memory: all alike
        return tuple(range(len(names))), ()
    place = {name: i for i, name in enumerate(names)}
    return tuple(place[name] for name in row.preferred), tuple(
        place[name] for name in row.available
    )


def _rounds(ours: Sequence[int], theirs: Sequence[int]) -> list[list[Rail]]:
    """All pairs, in rounds: in each every NIC has a partner, and none has two if it can be so."""
    longer = max(len(ours), len(theirs))
    return [
        [Rail(ours[i % len(ours)], theirs[(i + turn) % len(theirs)]) for i in range(longer)]
        for turn in range(len(theirs))
        if ours
    ]
