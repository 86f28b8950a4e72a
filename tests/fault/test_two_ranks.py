"""Tensor parallelism of two: four processes, rank i reads from rank i."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import msgspec
import pytest
from rank_child import RankProcess

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mooncake_connector.peers import PeerRef

OWN, THEIRS = [1, 2, 3], [20, 4, 11]


def as_json(ref: PeerRef) -> object:
    return msgspec.to_builtins(ref)


class Servers:
    """Two ranks of a prefill server, which hold different bytes, and two of a decode server."""

    def __init__(self, opened: contextlib.ExitStack) -> None:
        def rank(name: str, number: int, seed: int | None) -> RankProcess:
            options = {"protocol": "tcp", "rank": number, "tp_size": 2, "seed": seed}
            return opened.enter_context(RankProcess(name, **options))

        self.prefill = [rank("prefill", number, number + 1) for number in range(2)]
        self.decode = [rank("decode", number, None) for number in range(2)]

    def fetch(self, transfer: str) -> None:
        """What the step of a request does on both ranks of decode."""
        for own, theirs in zip(self.decode, self.prefill, strict=True):
            own.ask("fetch", as_json(theirs.ref), transfer, OWN)

    def ends(self, transfer: str) -> list[dict[str, object]]:
        return [rank.ask("await_end", transfer, OWN) for rank in self.decode]


@pytest.fixture
def servers() -> Iterator[Servers]:
    with contextlib.ExitStack() as opened:
        yield Servers(opened)


def test_each_rank_gets_its_own_ranks_bytes(servers: Servers) -> None:
    servers.fetch("t")  # decode asks first: both at once
    for rank in servers.prefill:
        rank.ask("offer", "t", THEIRS)
    right = [rank.ask("digest", THEIRS) for rank in servers.prefill]
    assert right[0] != right[1]
    assert servers.ends("t") == [{"right": True, "bytes": each} for each in right]
    for rank in servers.prefill:
        rank.ask("await_sent", "t")


def test_pages_that_expire_on_one_rank_fail_that_rank_and_no_other(servers: Servers) -> None:
    """The framework fails a request on all ranks when one reports it as failed."""
    for rank in servers.prefill:
        rank.ask("offer", "t", THEIRS)
    for rank in servers.decode:
        rank.ask("hold_reads", 0)
    servers.fetch("t")
    for rank in servers.decode:
        rank.ask("await_read")
    servers.prefill[1].ask("end", "t")
    for rank in servers.decode:
        rank.ask("release_reads")
    assert [end["right"] for end in servers.ends("t")] == [True, False]
    assert servers.decode[0].ask("failures") == {}
    assert servers.decode[1].ask("failures") == {"gone": 1}
    for rank in servers.prefill:
        rank.ask("await_sent", "t")


def test_a_rank_that_is_led_to_the_wrong_rank_is_refused(servers: Servers) -> None:
    servers.prefill[1].ask("offer", "t", THEIRS)
    servers.decode[0].ask("fetch", as_json(servers.prefill[1].ref), "t", OWN)
    assert not servers.decode[0].ask("await_end", "t", OWN)["right"]
    assert servers.decode[0].ask("failures") == {"prefill_gone": 1}
