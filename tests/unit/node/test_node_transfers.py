"""One request from end to end: the wanted pages arrive, no other byte changes, all is freed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from node_stage import Rank, run, until

if TYPE_CHECKING:
    from collections.abc import Callable

#: Bytes of one page of one group: 2 layers of 2 heads, 4 tokens, 8 elements of 4 bytes.
PAGE_BYTES = 2 * 2 * 4 * 8 * 4


@pytest.mark.parametrize("protocol", ["loopback", "tcp", "shm"])
def test_a_prompt_arrives_whole_and_nothing_else_changes(
    make: Callable[..., Rank], protocol: str
) -> None:
    prefill, decode = make("prefill", seed=1, protocol=protocol), make("decode", protocol=protocol)
    theirs, own = run(0, 7, 3, 4, 30), run(0, 1, 2, 9, 0)
    prefill.offer(theirs)
    decode.fetch(prefill.ref, own)
    assert decode.await_end()
    assert (decode.pages(own) == prefill.pages(theirs)).all()
    others = run(0, *sorted(set(range(32)) - {0, 1, 2, 9}))
    assert not decode.pages(others).any()
    prefill.await_sent()
    assert decode.bytes_read == 4 * PAGE_BYTES
    assert prefill.node.prefill.held_pages() == 0


def test_a_decode_that_asks_before_prefill_has_heard_of_the_request_gets_it(
    prefill: Rank, decode: Rank
) -> None:
    decode.fetch(prefill.ref, run(0, 5))
    until(lambda: prefill.node.prefill._parking._parked, "the parked subscription")
    prefill.offer(run(0, 6))
    assert decode.await_end()
    assert (decode.pages(run(0, 5)) == prefill.pages(run(0, 6))).all()


def test_reading_overlaps_the_rest_of_the_prefill(prefill: Rank, decode: Rank) -> None:
    decode.faults.hold()
    prefill.node.prefill.open("t", "p-t", "key")
    decode.fetch(prefill.ref, run(0, 1, 2, 3))
    prefill.node.prefill.pages_ready("t", [run(0, 11)], last=False)
    decode.faults.wait_held()  # the first chunk is being read, the others are not computed
    prefill.node.prefill.pages_ready("t", [run(1, 12)], last=False)
    prefill.node.prefill.pages_ready("t", [run(2, 13)], last=True)
    prefill.node.prefill.hold("t", "p-t")
    decode.faults.release()
    assert decode.await_end()
    assert (decode.pages(run(0, 1, 2, 3)) == prefill.pages(run(0, 11, 12, 13))).all()
    prefill.await_sent()
    assert decode.bytes_read == 3 * PAGE_BYTES  # no chunk was read twice


def test_pages_that_decode_has_are_not_moved(prefill: Rank, decode: Rank) -> None:
    prefill.offer(run(0, 1, 2, 3, 4))
    decode.fetch(prefill.ref, run(2, 20, 21))
    assert decode.await_end()
    assert (decode.pages(run(0, 20, 21)) == prefill.pages(run(0, 3, 4))).all()
    assert decode.bytes_read == 2 * PAGE_BYTES


def test_a_window_group_comes_with_the_last_chunk_and_only_its_window(
    make: Callable[..., Rank],
) -> None:
    kinds = ("full", "window")
    prefill, decode = make("prefill", seed=1, kinds=kinds), make("decode", kinds=kinds)
    nothing = np.zeros(0, np.uint64)
    prefill.node.prefill.open("t", "p-t", "key")
    decode.fetch(prefill.ref, run(0, 1, 2, 3, 4), run(2, 8, 9))
    prefill.node.prefill.pages_ready(
        "t", [run(0, 11, 12), run(2)._replace(ids=nothing)], last=False
    )
    prefill.node.prefill.pages_ready("t", [run(2, 13, 14), run(2, 18, 19)], last=True)
    prefill.node.prefill.hold("t", "p-t")
    assert decode.await_end()
    assert (decode.pages(run(0, 1, 2, 3, 4)) == prefill.pages(run(0, 11, 12, 13, 14))).all()
    assert (decode.pages(run(0, 8, 9), 1) == prefill.pages(run(0, 18, 19), 1)).all()
    assert decode.bytes_read == 6 * PAGE_BYTES


def test_two_decode_nodes_read_from_one_prefill_side_by_side(
    make: Callable[..., Rank], prefill: Rank, decode: Rank
) -> None:
    other = make("other")
    prefill.offer(run(0, 1), transfer="one")
    prefill.offer(run(0, 2), transfer="two")
    decode.fetch(prefill.ref, run(0, 5), transfer="one")
    other.fetch(prefill.ref, run(0, 6), transfer="two")
    assert decode.await_end()
    assert other.await_end()
    assert (decode.pages(run(0, 5)) == prefill.pages(run(0, 1))).all()
    assert (other.pages(run(0, 6)) == prefill.pages(run(0, 2))).all()


def test_a_request_that_needs_nothing_frees_prefills_pages_at_once(
    prefill: Rank, decode: Rank
) -> None:
    prefill.offer(run(0, 1, 2))
    decode.node.decline("t", "d", prefill.ref)
    prefill.await_sent()
    decode.settle()
    decode.look()
    assert not decode.received  # nothing was fetched, so nothing is reported


def test_fewer_pages_than_wanted_are_a_failure_and_free_prefills(
    prefill: Rank, decode: Rank, caplog: pytest.LogCaptureFixture
) -> None:
    prefill.offer(run(0, 1, 2))
    decode.fetch(prefill.ref, run(0, 5, 6, 7))
    assert not decode.await_end()
    assert decode.failures == {"short": 1}
    assert "few" in caplog.text or "less" in caplog.text
    prefill.await_sent()


def test_a_hundred_requests_at_once_all_arrive(prefill: Rank, decode: Rank) -> None:
    names = [f"t{n}" for n in range(100)]
    for n, name in enumerate(names):
        prefill.offer(run(0, n % 32), transfer=name)
    for n, name in enumerate(names):
        decode.fetch(prefill.ref, run(0, n % 32), transfer=name, request=name)
    assert all(decode.await_end(name) for name in names)
    for layers in zip(decode.cache[0], prefill.cache[0], strict=True):
        assert (layers[0] == layers[1]).all()
    for name in names:
        prefill.await_sent(name)
