"""One decode rank that reads from several prefill ranks, or from one of another shape."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest
from node_stage import LAYERS, Rank, run

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def stage(make: Callable[..., Rank], number: int, layers: Sequence[int], **options: object) -> Rank:
    """Prefill's pipeline stage of two."""
    spec = {"pp_rank": number, "pp_size": 2}
    return make(f"stage{number}", seed=number + 1, layers=layers, spec=spec, **options)


def refused(prefill: Rank, decode: Rank, says: str, caplog: pytest.LogCaptureFixture) -> None:
    """Both sides name what differs, and no byte moves."""
    groups = len(decode.cache)
    prefill.offer(*[run(0, 7)] * groups)
    decode.fetch(prefill.ref, *[run(0, 1)] * groups)
    assert not decode.await_end()
    assert says in decode.failed["d"]
    by = {record.name for record in caplog.records if says in record.getMessage()}
    assert by == {"mooncake_connector.node", "mooncake_connector.decode"}
    assert decode.faults.moves == 0


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_one_decode_stage_reads_all_layers_from_two_prefill_stages(
    make: Callable[..., Rank], order: tuple[int, int]
) -> None:
    stages = [stage(make, 0, [order[0]]), stage(make, 1, [order[1]])]
    decode = make("decode")
    own = run(0, 1, 2, 9)
    for number, prefill in enumerate(stages):
        prefill.offer(run(0, 10 + number, 20, 3))
        decode.fetch(prefill.ref, own, request=f"d{number}")
    for number, prefill in enumerate(stages):
        assert decode.await_end(f"d{number}")
        (theirs,) = prefill.pages(run(0, 10 + number, 20, 3))
        assert (decode.pages(own)[order[number]] == theirs).all()
        prefill.await_sent()
    others = run(0, *sorted(set(range(32)) - {1, 2, 9}))
    assert not decode.pages(others).any()


def test_a_stage_that_names_its_layers_in_another_order_is_read_by_name(
    make: Callable[..., Rank],
) -> None:
    prefill, decode = stage(make, 0, [1, 0]), make("decode")
    prefill.offer(run(0, 7))
    decode.fetch(prefill.ref, run(0, 1))
    assert decode.await_end()
    assert (decode.pages(run(0, 1)) == prefill.pages(run(0, 7))[::-1]).all()


def test_a_stage_with_a_layer_that_decode_lacks_is_refused_naming_both(
    make: Callable[..., Rank], caplog: pytest.LogCaptureFixture
) -> None:
    theirs, ours = ("group0.layer1", "group0.layer2"), ("group0.layer1",)
    says = f"groups[0].layers: prefill has {theirs!r}, decode has {ours!r}"
    refused(stage(make, 1, [1, 2]), make("decode"), says, caplog)


def test_a_stage_with_a_layer_of_another_size_is_refused_naming_both(
    make: Callable[..., Rank], caplog: pytest.LogCaptureFixture
) -> None:
    prefill = stage(make, 1, [1])
    (sizes,) = (group.page_bytes for group in prefill.spec.groups)
    group = msgspec.structs.replace(
        prefill.spec.groups[0],
        layers=("group0.layer0", "group0.layer1"),
        page_bytes=(sizes[0], sizes[0] * 2),
    )
    decode = make("decode", spec={"groups": (group,)})
    says = f"page_bytes: prefill has {sizes!r}, decode has {(sizes[0] * 2,)!r}"
    refused(prefill, decode, says, caplog)


@pytest.mark.parametrize("pp_size", [1, 3])
def test_several_decode_stages_need_as_many_on_prefill(
    make: Callable[..., Rank], caplog: pytest.LogCaptureFixture, pp_size: int
) -> None:
    prefill = make("prefill", seed=1, spec={"pp_size": pp_size})
    decode = make("decode", spec={"pp_size": 2})
    refused(prefill, decode, f"pp_size: prefill has {pp_size}, decode has 2", caplog)


def test_equal_stages_read_from_their_own_number_only(
    make: Callable[..., Rank],
) -> None:
    stages = [make(f"p{n}", seed=n + 1, spec={"pp_rank": n, "pp_size": 2}) for n in range(2)]
    decode = make("decode", spec={"pp_rank": 1, "pp_size": 2})
    stages[1].offer(run(0, 7))
    decode.fetch(stages[1].ref, run(0, 1), request="right")
    assert decode.await_end("right")
    decode.faults.hold()
    moved = decode.faults.moves
    stages[0].offer(run(0, 7))
    decode.fetch(stages[0].ref, run(0, 2))
    assert not decode.await_end()
    assert "pp_rank: prefill has 0, decode has 1" in decode.failed["d"]
    assert decode.faults.moves == moved


@pytest.mark.parametrize("kinds", [("mla",), ("mla", "metadata")])
def test_any_rank_reads_an_mla_cache_from_the_one_rank_of_prefill(
    make: Callable[..., Rank], kinds: tuple[str, ...]
) -> None:
    prefill = make("prefill", seed=1, kinds=kinds)
    decode = make("decode", kinds=kinds, rank=1, tp_size=2)
    prefill.offer(*[run(0, 7)] * len(kinds))
    decode.fetch(prefill.ref, *[run(0, 1)] * len(kinds))
    assert decode.await_end()
    for group in range(len(kinds)):
        assert (decode.pages(run(0, 1), group) == prefill.pages(run(0, 7), group)).all()
    assert len(decode.cache[0]) == LAYERS


@pytest.mark.parametrize("kinds", [("full",), ("mla", "full"), ("mla", "state")])
def test_a_cache_that_ranks_share_out_is_not_read_from_one_rank(
    make: Callable[..., Rank], caplog: pytest.LogCaptureFixture, kinds: tuple[str, ...]
) -> None:
    prefill = make("prefill", seed=1, kinds=kinds)
    decode = make("decode", kinds=kinds, rank=1, tp_size=2)
    refused(prefill, decode, "tp_size: prefill has 1, decode has 2", caplog)
