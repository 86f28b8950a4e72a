"""What prefill knows of one attempt of one transfer, and of each of its readers. Pure."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

import numpy as np

from mooncake_connector import wire
from mooncake_connector.plan import PageRun
from mooncake_connector.session import HoldState

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mooncake_connector.control import Channel


class Reader:
    """One reading rank of one attempt."""

    def __init__(self, channel: Channel, name: str, first: tuple[int, ...] = ()) -> None:
        self.channel = channel
        self.name = name
        self.first = first  # per group; empty until it subscribed
        self.told: list[int] = []  # position behind the last page told, per group
        self.told_last = False
        self.held: bool | None = None  # the verdict, once fixed
        self.gave_up = False  # it left without having read all


class Hold:
    """One attempt of one transfer. `deadline` is on the clock of the side that keeps it.

    Whoever opened it may read `state`, `reason`, `last`, `subscribed`, `first` and `delivered` from
    any thread; only `PrefillSide` changes it.
    """

    def __init__(
        self,
        transfer_id: str,
        attempt: int,
        request_id: str,
        prompt_key: str,
        deadline: float,
        *,
        reusable: bool = False,
        on_change: Callable[[Hold], None] | None = None,
    ) -> None:
        self.transfer_id = transfer_id
        self.attempt = attempt
        self.request_id = request_id
        self.prompt_key = prompt_key
        self.deadline = deadline
        self.reusable = reusable
        self.on_change = on_change
        self.state = HoldState.COMPUTING
        self.grant = secrets.token_bytes(16)
        self.pages: list[PageRun] = []  # final ones, a run per group
        self.last = False  # no more pages will become final
        self.last_at = 0.0  # when it became so
        self.readers: dict[str, Reader] = {}
        self.expected = 1  # how many readers must release
        self.claims: set[Channel] = set()
        self.unclaimed_until = float("inf")  # when to give up on a hold that nobody asked for
        self.reason = ""  # why it ended, told to late comers
        self.retry = False  # it ended by a preemption: the next attempt is on its way
        self.left = False  # its readers are through: nobody will come for a next attempt either

    @property
    def subscribed(self) -> bool:
        """Did every reader say what it wants?"""
        return sum(bool(reader.first) for reader in list(self.readers.values())) >= self.expected

    @property
    def first(self) -> tuple[int, ...]:
        """Per group: the first position that some reader wants. There is a reader."""
        wanted = [reader.first for reader in list(self.readers.values()) if reader.first]
        return tuple(min(positions) for positions in zip(*wanted, strict=True))

    @property
    def delivered(self) -> bool:
        """Did every reader get all that it wanted?"""
        readers = list(self.readers.values())
        done = sum(bool(reader.held) and not reader.gave_up for reader in readers)
        return done == len(readers) >= self.expected

    @property
    def given_up(self) -> bool:
        """Did some reader leave without having read all?"""
        return any(reader.gave_up for reader in self.readers.values())

    def add_pages(self, pages: Sequence[PageRun], *, last: bool) -> None:
        """More pages are final; each group's run continues where its last one ended."""
        self.last = last
        if self.pages:
            self.pages = [_extend(a, b) for a, b in zip(self.pages, pages, strict=True)]
        else:
            self.pages = list(pages)

    def news_for(self, reader: Reader) -> wire.Ready | None:
        """What this reader was not told yet, or None; it counts as told."""
        if not self.pages or not reader.first or reader.held is not None or reader.told_last:
            return None
        told = reader.told or list(reader.first)
        news = [_tail(run, position) for run, position in zip(self.pages, told, strict=True)]
        if not self.last and not any(len(run.ids) for run in news):
            return None
        reader.told = [max(before, run.end) for before, run in zip(told, news, strict=True)]
        reader.told_last = self.last
        return wire.Ready(
            transfer_id=self.transfer_id,
            attempt=self.attempt,
            reader=reader.name,
            grant=self.grant,
            pages=tuple(wire.pack_pages(run) for run in news),
            last=self.last,
        )

    def gone_for(self, reader: Reader) -> wire.Gone:
        """What this reader is told when the hold ends before it was served."""
        return wire.Gone(
            transfer_id=self.transfer_id,
            attempt=self.attempt,
            reader=reader.name,
            reason=self.reason,
            retry=self.retry,
        )

    def follow(self, before: Hold) -> bool:
        """Expect those whom a preempted attempt left unserved; False: they are all gone."""
        unserved = {r.channel for r in before.readers.values() if r.held is None} | before.claims
        self.claims = {channel for channel in unserved if not channel.closed_because}
        return bool(self.claims) or not (unserved or before.left)

    def over(self, now: float) -> bool:
        """Has the request's total passed, or did nobody ask for a finished one for too long?"""
        unclaimed = not self.claims and not self.readers and self.unclaimed_until <= now
        return unclaimed or self.deadline <= now

    def all_left(self) -> bool:
        """Did everybody who came, or announced to come, release or die?

        Who has not come yet is not waited for when one of those who came gave up: that fails the
        request on all of its ranks.
        """
        settled = sum(reader.held is not None for reader in self.readers.values())
        if self.claims or settled < len(self.readers):
            return False
        return settled >= self.expected or not settled or self.given_up


def _extend(run: PageRun, more: PageRun) -> PageRun:
    if not len(run.ids):
        return more
    if len(more.ids) and more.first != run.end:
        raise ValueError(f"pages continue at position {more.first}, expected {run.end}")
    return PageRun(run.first, np.concatenate([run.ids, more.ids]))


def _tail(run: PageRun, first: int) -> PageRun:
    first = max(first, run.first)
    return PageRun(first, run.ids[first - run.first :])
