"""A finished prefill that no decode server asks for: its client or router went away."""

from __future__ import annotations

from typing import TYPE_CHECKING

import raw_peer
from node_stage import Clock, Rank, run, until

from mooncake_connector import wire

if TYPE_CHECKING:
    from collections.abc import Callable


def test_a_hold_that_nobody_asks_for_is_given_back_after_its_minute(
    make: Callable[..., Rank],
) -> None:
    clock = Clock()
    prefill = make("prefill", seed=1, now=clock)
    prefill.offer(run(0, 1))
    clock.advance(59)
    prefill.node.prefill.sweep()
    prefill.look()
    assert not prefill.sent
    clock.advance(2)
    prefill.await_sent()
    assert prefill.failures == {"unclaimed": 1}


def test_a_claim_keeps_the_hold_until_the_total_is_over(make: Callable[..., Rank]) -> None:
    clock = Clock()
    prefill = make("prefill", seed=1, now=clock)
    prefill.offer(run(0, 1))
    with raw_peer.join(prefill) as decode:
        decode.send(wire.Claim(transfer_id="t"))
        until(lambda: prefill.node.prefill._live["t"].claims, "the claim")
        clock.advance(299)
        prefill.node.prefill.sweep()
        prefill.look()
        assert not prefill.sent
        clock.advance(2)
        prefill.await_sent()
    assert prefill.failures == {"hold_timeout": 1}
