"""Two servers that do not fit: refused with both values before a byte moves, and only they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from sglang_flow import KEPT, OWN, OWN_ROW, THEIR_ROW, THEIRS, begin, finish, transfer
from sglang_ranks import SOON

if TYPE_CHECKING:
    from sglang_ranks import Server, Servers


@pytest.mark.parametrize(
    ("theirs", "ours", "named"),
    [
        ({"tp": 2}, {}, ("tensor-parallel size is 2, ours is 1",)),
        ({"page_size": 8}, {}, ("page_size=8", "page_size=4")),
        ({"dtype": "fp8_e4m3"}, {"dtype": "bf16"}, ("dtype=fp8_e4m3", "dtype=bf16")),
        ({"kv_layout": "nhd"}, {"kv_layout": "hnd"}, ("kv_layout=nhd", "kv_layout=hnd")),
        # Only one of them names its layout: SGLang lets that pass.
        ({"kv_layout": "hnd"}, {}, ("prefill has 'sglang/hnd', decode has 'sglang/nhd'",)),
        ({"model": "other"}, {}, ("prefill has 'other-2', decode has 'tiny-2'", "model_digest")),
        ({"mla": True}, {}, ("prefill has 'mla', decode has 'full'",)),
    ],
)
def test_what_does_not_fit_is_refused_naming_both_values(
    servers: Servers, theirs: dict[str, Any], ours: dict[str, Any], named: tuple[str, ...]
) -> None:
    stranger = servers.make("prefill", **theirs)
    fitting, decode = servers.make("prefill", **ours), servers.make("decode", **ours)
    [reader] = decode.ranks
    reader.ask("fill", KEPT)
    before = decode.each("digests", list(range(48)), [])
    begin(stranger.ranks[:1], decode.ranks, stranger.address)
    reader.await_status("r", "Failed")
    reason = reader.ask("fail", "r")["reason"]
    assert all(word in reason for word in named), reason
    assert decode.each("digests", list(range(48)), []) == before
    assert decode.each("metadata", OWN_ROW) == [["", ""]]
    stranger.ranks[0].ask("abort", "r")
    stranger.ranks[0].ask("clear", "r")
    transfer(fitting, decode, "next", 8)
    for server in (decode, fitting, stranger):
        server.assert_nothing_is_left()


def test_state_of_a_hybrid_model_moves_with_the_last_chunk(servers: Servers) -> None:
    """A window's last pages and one row of recurrent state, addressed by rows of their own."""
    prefill = servers.make("prefill", states=("swa", "mamba"))
    decode = servers.make("decode", states=("swa", "mamba"))
    their_states, own_states = [[5, 6, 2], [9]], [[1, 0, 7], [4]]
    begin_with_states(prefill, decode, their_states, own_states)
    finish(prefill.ranks, decode.ranks)
    right = prefill.each("digests", THEIRS, their_states)
    assert {"swa 0", "swa 1", "mamba 0", "mamba 1"} < right[0].keys()
    assert decode.each("digests", OWN, own_states) == right
    for server in (decode, prefill):
        server.assert_nothing_is_left()


def test_state_of_another_number_of_rows_is_refused_with_both_numbers(servers: Servers) -> None:
    """Rows of state have no positions: of lists of two lengths nobody knows what belongs where."""
    prefill = servers.make("prefill", states=("swa",))
    decode = servers.make("decode", states=("swa",))
    begin_with_states(prefill, decode, [[5, 6, 2]], [[1, 0]])
    decode.await_status("r", "Failed")
    reason = decode.ranks[0].ask("fail", "r")["reason"]
    assert "offered 3 rows" in reason
    assert "2 are needed" in reason
    assert decode.each("metadata", OWN_ROW) == [["", ""]]
    prefill.await_status("r", "Failed", SOON)
    assert "decode gave it up" in prefill.ranks[0].ask("fail", "r")["reason"]
    begin_with_states(prefill, decode, [[5, 6]], [[1, 0]], "next", 8)
    finish(prefill.ranks, decode.ranks, "next")
    assert decode.each("digests", [], [[1, 0]]) == prefill.each("digests", [], [[5, 6]])
    for server in (decode, prefill):
        server.assert_nothing_is_left()


def begin_with_states(
    prefill: Server,
    decode: Server,
    theirs: list[list[int]],
    own: list[list[int]],
    name: str = "r",
    room: int = 7,
) -> None:
    prefill.each("offer", name, room, pages=THEIRS, aux=THEIR_ROW, states=theirs)
    decode.each("want", name, room, prefill.address)
    decode.each("allocate", name, pages=OWN, aux=OWN_ROW, states=own)
