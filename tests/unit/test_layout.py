"""What a cache is called and where its bytes lie."""

from __future__ import annotations

import itertools

import msgspec
import numpy as np
import pytest

from mooncake_connector.layout import CacheSpec, GroupSpec, PieceTable, layer_layout
from mooncake_connector.plan import differences

GROUP = GroupSpec(kind="full", layers=("l0", "l1"), page_bytes=(512, 512))
SPEC = CacheSpec(
    model="llama",
    model_digest="abcd",
    revision="main",
    dtype="bfloat16",
    page_size=64,
    order="CPU_ATTN/LBHNC",
    tp_rank=0,
    tp_size=2,
    groups=(GROUP,),
)


def changed(**fields: object) -> CacheSpec:
    return msgspec.structs.replace(SPEC, **fields)


def test_equal_caches_do_not_differ() -> None:
    assert differences(SPEC, changed()) == []


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("model", "qwen"),
        ("model_digest", "ef01"),
        ("revision", ""),
        ("dtype", "fp8_e4m3"),
        ("page_size", 16),
        ("order", "CPU_ATTN/LBNHC"),
        ("tp_rank", 1),
        ("tp_size", 4),
    ],
)
def test_a_differing_field_is_named_with_both_values(field: str, other: object) -> None:
    found = differences(SPEC, changed(**{field: other}))
    assert found == [f"{field}: prefill has {getattr(SPEC, field)!r}, decode has {other!r}"]


def test_every_field_of_a_cache_is_compared() -> None:
    tested = {"model", "model_digest", "revision", "dtype", "page_size", "order"}
    ranks = {"tp_rank", "tp_size", "pp_rank", "pp_size"}
    assert set(SPEC.__struct_fields__) == tested | ranks | {"groups"}
    assert set(GROUP.__struct_fields__) == {"kind", "window", "layers", "page_bytes"}


@pytest.mark.parametrize(
    ("field", "other"),
    [("kind", "mla"), ("window", 128), ("layers", ("l0", "l2")), ("page_bytes", (512, 1024))],
)
def test_a_differing_field_of_a_group_is_named_with_both_values(field: str, other: object) -> None:
    groups = (GROUP, msgspec.structs.replace(GROUP, **{field: other}))
    found = differences(changed(groups=(GROUP, GROUP)), changed(groups=groups))
    assert found == [
        f"groups[1].{field}: prefill has {getattr(GROUP, field)!r}, decode has {other!r}"
    ]


def test_all_differences_are_named_at_once() -> None:
    found = differences(SPEC, changed(dtype="float32", page_size=16, groups=()))
    assert len(found) == 3
    assert found[-1] == "groups: prefill has 1 KV cache groups, decode has 0"


def test_a_page_of_vllms_cpu_cache_is_one_piece() -> None:
    layer = layer_layout(4096, (256, 2, 64, 128), (16384, 8192, 128, 1), 4, 256)
    assert (layer.piece_bytes, layer.piece_offsets, layer.page_stride) == (65536, (0,), 65536)
    assert layer.pages == 256
    assert layer.page_bytes == 65536


def test_heads_outside_of_blocks_make_one_piece_per_head() -> None:
    # (blocks, heads, tokens, content) as it is seen; heads outermost in memory
    layer = layer_layout(0, (10, 2, 4, 8), (32, 320, 8, 1), 2, 10)
    assert layer.piece_bytes == 4 * 8 * 2
    assert layer.piece_offsets == (0, 640)
    assert layer.page_stride == 64


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_pieces_cover_exactly_the_bytes_of_a_page_in_any_order_of_axes(
    order: tuple[int, ...],
) -> None:
    """LBNHC, LBHNC and all else: the axes of memory in any order behind the same view."""
    shape = (6, 2, 4, 8)
    memory = np.arange(np.prod(shape), dtype=np.uint32).reshape([shape[axis] for axis in order])
    view = memory.transpose(np.argsort(order))
    assert view.shape == shape
    layer = layer_layout(0, shape, [stride // 4 for stride in view.strides], 4, 6)
    table = PieceTable([layer])
    flat = memory.ravel()
    for page in range(6):
        starts = table.addresses(np.array([page], np.uint64))[:, 0] // 4
        got = [flat[int(s) : int(s) + layer.piece_bytes // 4] for s in starts]
        assert sorted(np.concatenate(got)) == sorted(view[page].ravel())


def test_kernel_blocks_smaller_than_pages_are_one_page_together() -> None:
    # 256 blocks of 16 tokens behind a block table of 64 pages of 64 tokens
    layer = layer_layout(0, (256, 16, 8), (128, 8, 1), 2, 64)
    assert (layer.pages, layer.page_stride) == (64, 4 * 128 * 2)
    assert (layer.piece_bytes, layer.piece_offsets) == (4 * 128 * 2, (0,))


def test_kernel_blocks_with_gaps_between_them_are_pieces_of_one_page() -> None:
    layer = layer_layout(0, (8, 16), (32, 1), 1, 4)
    assert (layer.piece_bytes, layer.piece_offsets, layer.page_stride) == (16, (0, 32), 64)


def test_layers_between_blocks_leave_a_stride_and_no_gap_in_the_page() -> None:
    # two layers' pages side by side in one tensor, this is the second one
    layer = layer_layout(100, (5, 16), (32, 1), 1, 5)
    assert (layer.address, layer.piece_bytes, layer.piece_offsets) == (100, 16, (0,))
    assert layer.page_stride == 32


@pytest.mark.parametrize("strides", [(16, 0, 1), (16, -8, 1)])
def test_a_broadcast_or_reversed_axis_is_refused(strides: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"strides .* are not those of a cache"):
        layer_layout(0, (4, 2, 8), strides, 1, 4)


@pytest.mark.parametrize("pages", [0, 3, 5])
def test_blocks_that_do_not_divide_into_pages_are_refused(pages: int) -> None:
    with pytest.raises(ValueError, match=f"4 kernel blocks do not divide into {pages} pages"):
        layer_layout(0, (4, 8), (8, 1), 1, pages)
