"""Tensor parallelism: which rank reads from which, equal and, for MLA, unequal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sglang_flow import ORDER, OWN, OWN_ROW, THEIR_ROW, THEIRS, begin, finish, transfer

if TYPE_CHECKING:
    from sglang_ranks import Servers


def test_each_rank_reads_from_the_rank_with_its_own_heads(servers: Servers) -> None:
    prefill, decode = servers.make("prefill", tp=2), servers.make("decode", tp=2)
    transfer(prefill, decode)
    first, second = prefill.each("digests", THEIRS, [])
    assert first != second
    for server in (decode, prefill):
        server.assert_nothing_is_left()


@pytest.mark.parametrize(("theirs", "ours"), [(2, 1), (1, 2), (4, 2)])
def test_an_mla_cache_is_read_whole_from_one_rank_and_the_others_end_well(
    servers: Servers, theirs: int, ours: int
) -> None:
    """Prefill's ranks hold copies in SGLang; here they differ, which shows who was read from."""
    prefill = servers.make("prefill", tp=theirs, mla=True)
    decode = servers.make("decode", tp=ours, mla=True)
    begin(prefill.ranks, decode.ranks, prefill.address)
    statuses = finish(prefill.ranks, decode.ranks)
    assert all(seen == [s for s in ORDER if s in seen] for seen in statuses)
    held = prefill.each("digests", THEIRS, [])
    rows = prefill.each("metadata", THEIR_ROW)
    real = [rank * theirs // ours for rank in range(ours)]
    assert decode.each("digests", OWN, []) == [held[rank] for rank in real]
    assert decode.each("metadata", OWN_ROW) == [rows[rank] for rank in real]
    page_bytes = 4096 * 2  # in both layers
    readers = max(1, ours // theirs)
    assert prefill.each("metric", "r") == [len(THEIRS) * page_bytes * readers] * theirs
    for server in (decode, prefill):
        server.assert_nothing_is_left()
