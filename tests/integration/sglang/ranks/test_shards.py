"""Tensor parallelism: which rank reads from which, equal and, for MLA, unequal."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang_ranks import Servers

THEIRS, OWN = [20, 4, 11, 12], [1, 2, 3, 7]
ORDER = ["Bootstrapping", "WaitingForInput", "Transferring", "Success"]


def test_each_rank_reads_from_the_rank_with_its_own_heads(servers: Servers) -> None:
    prefill = servers.make("prefill", tp=2)
    decode = servers.make("decode", tp=2)
    prefill.each("offer", "r", 7, pages=THEIRS, aux=3)
    decode.each("want", "r", 7, prefill.address)
    decode.each("allocate", "r", pages=OWN, aux=5)
    decode.await_status("r", "Success")
    prefill.await_status("r", "Success")
    right = prefill.each("digests", THEIRS, [])
    assert right[0] != right[1]
    assert decode.each("digests", OWN, []) == right
    assert decode.each("metadata", 5) == prefill.each("metadata", 3)
    for server in (decode, prefill):
        server.each("clear", "r")
        server.assert_nothing_is_left()
