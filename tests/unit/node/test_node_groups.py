"""Groups that are no KV: rows of state on both sides, and the row of metadata that comes last."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import raw_peer
from node_stage import Rank, run, until
from raw_peer import subscribe

from mooncake_connector import wire
from mooncake_connector.plan import PageRun

if TYPE_CHECKING:
    from collections.abc import Callable

#: Bytes of one page of one group: 2 layers of 2 heads, 4 tokens, 8 elements of 4 bytes.
PAGE_BYTES = 2 * 2 * 4 * 8 * 4


def nothing(first: int = 0) -> PageRun:
    return PageRun(first, np.zeros(0, np.uint64))


def pair(make: Callable[..., Rank], *kinds: str) -> tuple[Rank, Rank]:
    return make("prefill", seed=1, kinds=kinds), make("decode", kinds=kinds)


@pytest.mark.parametrize("pages", [0, 3])
def test_metadata_is_read_behind_everything_else_in_a_batch_of_its_own(
    make: Callable[..., Rank], pages: int
) -> None:
    prefill, decode = pair(make, "metadata", "full", "state")  # whichever stands first
    theirs, own = run(0, 11, 12, 13), PageRun(3 - pages, np.arange(pages, dtype=np.uint64))
    prefill.offer(run(0, 30), theirs, run(0, 8, 9))
    decode.fetch(prefill.ref, run(0, 20), own, run(0, 1, 2))
    assert decode.await_end()
    assert decode.batches == [(pages + 2) * PAGE_BYTES, PAGE_BYTES]
    assert (decode.pages(run(0, 20), 0) == prefill.pages(run(0, 30), 0)).all()
    assert (decode.pages(own, 1) == prefill.pages(theirs, 1)[:, 3 - pages :]).all()
    assert (decode.pages(run(0, 1, 2), 2) == prefill.pages(run(0, 8, 9), 2)).all()
    prefill.await_sent()


def test_a_row_of_metadata_is_untouched_while_the_last_chunk_is_read(
    make: Callable[..., Rank],
) -> None:
    prefill, decode = pair(make, "full", "metadata")
    prefill.node.prefill.open("t", "p-t", "key")
    decode.faults.hold()
    decode.fetch(prefill.ref, run(0, 1, 2), run(0, 20))
    prefill.node.prefill.pages_ready("t", [run(0, 11), nothing()], last=False)
    decode.faults.wait_held()
    prefill.node.prefill.pages_ready("t", [run(1, 12), run(0, 30)], last=True)
    prefill.node.prefill.hold("t", "p-t")
    decode.faults.release()
    assert decode.await_end()
    assert decode.batches == [PAGE_BYTES] * 3
    assert (decode.pages(run(0, 20), 1) == prefill.pages(run(0, 30), 1)).all()


def test_metadata_alone_is_read_when_no_page_is_moved(make: Callable[..., Rank]) -> None:
    prefill, decode = pair(make, "full", "metadata")
    prefill.offer(run(0, 11, 12), run(0, 30))
    decode.fetch(prefill.ref, nothing(2), run(0, 20))
    assert decode.await_end()
    assert decode.batches == [PAGE_BYTES]
    assert not decode.pages(run(0, *range(32)), 0).any()
    assert (decode.pages(run(0, 20), 1) == prefill.pages(run(0, 30), 1)).all()
    prefill.await_sent()


@pytest.mark.parametrize("pages", [0, 1])
def test_pages_without_their_row_of_metadata_are_not_received(
    make: Callable[..., Rank], pages: int
) -> None:
    prefill, decode = pair(make, "full", "metadata")
    prefill.offer(run(0, 11), nothing())
    decode.fetch(prefill.ref, run(0, 1) if pages else nothing(1), run(0, 20))
    assert not decode.await_end()
    assert decode.failures == {"short": 1}
    assert decode.batches == [PAGE_BYTES] * pages  # its KV is here
    prefill.await_sent()


def test_pages_whose_row_of_metadata_is_given_away_meanwhile_are_not_received(
    make: Callable[..., Rank],
) -> None:
    prefill, decode = pair(make, "full", "metadata")
    decode.faults.hold(after=1)  # the slice of KV passes
    prefill.offer(run(0, 11), run(0, 30))
    decode.fetch(prefill.ref, run(0, 1), run(0, 20))
    decode.faults.wait_held()
    assert (decode.pages(run(0, 1)) == prefill.pages(run(0, 11))).all()
    prefill.node.prefill.end("t", "prefill aborted it", retry=False)
    assert not decode.await_end()
    assert "prefill aborted it" in decode.failed["d"]
    assert not decode.pages(run(0, 20), 1).any()


@pytest.mark.parametrize(("theirs", "own"), [((8, 9), (1,)), ((8,), (1, 2)), ((), (1,))])
def test_lists_of_state_of_unequal_length_fail_with_both_numbers(
    make: Callable[..., Rank], theirs: tuple[int, ...], own: tuple[int, ...]
) -> None:
    prefill, decode = pair(make, "full", "state")
    prefill.offer(run(0, 11), run(0, *theirs))
    decode.fetch(prefill.ref, run(0, 1), run(0, *own))
    assert not decode.await_end()
    says = f"prefill offered {len(theirs)} rows of state, {len(own)} are needed"
    assert decode.failed == {"d": says}
    assert decode.failures == {"state_differs": 1}
    assert decode.faults.moves == 0
    prefill.await_sent(timeout=8.0)  # the total, 300 s, would give them back too


def test_prefill_hears_that_its_state_is_of_no_use(make: Callable[..., Rank]) -> None:
    prefill, decode = pair(make, "full", "state")
    with raw_peer.RawPrefill(prefill) as raw:
        decode.fetch(raw.ref, run(0, 1), run(0, 1))
        with raw.join() as peer:
            peer.receive(wire.Subscribe)
            pages = (wire.pack_pages(run(0, 11)), wire.pack_pages(run(0, 8, 9)))
            peer.send(
                wire.Ready(transfer_id="t", attempt=4, reader="", grant=b"", pages=pages, last=True)
            )
            said = peer.receive(wire.Release)
            assert (said.attempt, said.ok) == (4, False)
            assert not decode.await_end()


def test_state_that_does_not_match_ends_a_running_read_before_it_is_reported(
    make: Callable[..., Rank],
) -> None:
    prefill, decode = pair(make, "full", "state")
    decode.faults.hold(stubborn=True)
    prefill.node.prefill.open("t", "p-t", "key")
    decode.fetch(prefill.ref, run(0, 1), run(0, 1))
    prefill.node.prefill.pages_ready("t", [run(0, 11), nothing()], last=False)
    decode.faults.wait_held()
    prefill.node.prefill.pages_ready("t", [nothing(1), run(0, 8, 9)], last=True)
    prefill.node.prefill.hold("t", "p-t")
    until(lambda: decode.inside().error, "the mismatch")
    decode.look()
    assert not decode.received
    decode.faults.release()
    assert not decode.await_end()
    assert "2 rows of state, 1 are needed" in decode.failed["d"]
    prefill.await_sent()


def test_a_reader_that_needs_no_state_is_not_failed_for_it(make: Callable[..., Rank]) -> None:
    prefill, decode = pair(make, "full", "state")
    prefill.offer(run(0, 11), run(0, 8, 9))
    decode.fetch(prefill.ref, run(0, 1), nothing())
    assert decode.await_end()
    assert decode.batches == [PAGE_BYTES]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("first", [(), (0,), (0, 0, 0), (0, -1)])
def test_a_wrong_number_of_positions_closes_only_its_own_connection(
    make: Callable[..., Rank], first: tuple[int, ...], known: bool
) -> None:
    """Also where prefill has not heard of the transfer yet: `open` must not fail for it later."""
    prefill, _ = pair(make, "full", "state")
    with raw_peer.join(prefill) as bad, raw_peer.join(prefill) as good:
        if known:
            prefill.offer(run(0, 11), run(0, 8))
        bad.send(subscribe(first=first))
        assert bad.is_closed()
        if not known:
            prefill.offer(run(0, 11), run(0, 8))
        good.send(subscribe(first=(0, 0)))
        assert len(good.receive(wire.Ready).pages) == 2
        assert prefill.readers() == 1
