"""A paged KV cache: what it holds (`CacheSpec`) and where its bytes lie (`CacheLayout`). Pure.

A page is one block of the framework's block table: `page_size` tokens of one layer, all heads of
this rank, K and V. In memory it is one or more dense *pieces* at fixed offsets from the page's
start, because a framework may put heads or layers outside of blocks. Page `p` of a layer starts
at `address + p * page_stride`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import msgspec
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mooncake_engine.types import Uint64s


class GroupSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One KV cache group: layers that share a block table.

    Attributes:
        kind: "full" and "mla" keep the whole history, "mla" in the same form on every rank;
            "window" gives up blocks that left it; "state" has rows that both sides list in the
            same order (SGLang's hybrid models); "metadata" has one row per request and is read
            when all else is here.
        window: Tokens that a "window" group keeps; 0 for the others.
        layers: Layer names in model order; a pipeline stage names its own ones.
        page_bytes: Bytes of one page, layer by layer.
    """

    kind: Literal["full", "mla", "window", "state", "metadata"]
    layers: tuple[str, ...]
    page_bytes: tuple[int, ...]
    window: int = 0


class CacheSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank's cache holds. Two caches may talk when `plan.differences` finds none.

    Attributes:
        model: Name for people.
        model_digest: Hash of the model's configuration: rope, lengths, quantization, ...
        revision: Revision of the weights, "" when not pinned.
        dtype: Element type of the cache, "float32", "bfloat16", "fp8_e4m3", ...
        page_size: Tokens per page.
        order: How bytes lie inside a page; equal strings mean equal order.
        tp_rank: This rank.
        tp_size: Ranks that share the heads.
        pp_rank: This rank's pipeline stage.
        pp_size: Stages that share the layers.
        groups: In the framework's order.
    """

    model: str
    model_digest: str
    revision: str
    dtype: str
    page_size: int
    order: str
    tp_rank: int
    tp_size: int
    pp_rank: int = 0
    pp_size: int = 1
    groups: tuple[GroupSpec, ...]


class LayerLayout(msgspec.Struct, frozen=True, kw_only=True):
    """Where one layer's pages lie. Units are bytes.

    Attributes:
        address: Start of page 0.
        page_stride: From one page to the next.
        piece_bytes: Length of every dense piece of a page.
        piece_offsets: Start of each piece, relative to its page.
        pages: Number of pages; ids at or above it are refused.
    """

    address: int
    page_stride: int
    piece_bytes: int
    piece_offsets: tuple[int, ...]
    pages: int

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self.piece_bytes * len(self.piece_offsets)


class CacheLayout(msgspec.Struct, frozen=True):
    """Where a rank's cache lies: groups[g][l] is layer l of group g. Travels in `Welcome`."""

    groups: tuple[tuple[LayerLayout, ...], ...]


def page_bytes_at(layout: CacheLayout, address: int, nbytes: int) -> int:
    """Bytes of the pages that a region is made of from its start on; 0: of no one size.

    For the engine, which may have to split what it registers, and not within a page.
    """
    strides = {
        layer.page_stride
        for group in layout.groups
        for layer in group
        if address <= layer.address < address + nbytes
    }
    return strides.pop() if len(strides) == 1 else 0


class PieceTable:
    """One group's layout as arrays over all (layer, piece) pairs, for the planner."""

    __slots__ = ("base", "nbytes", "pages", "stride")

    def __init__(self, layers: Sequence[LayerLayout]) -> None:
        self.base = _uint64(layer.address + o for layer in layers for o in layer.piece_offsets)
        self.stride = _uint64(layer.page_stride for layer in layers for _ in layer.piece_offsets)
        self.nbytes = _uint64(layer.piece_bytes for layer in layers for _ in layer.piece_offsets)
        self.pages = min((layer.pages for layer in layers), default=0)

    def addresses(self, pages: Uint64s) -> Uint64s:
        """Start of every piece: shape (pieces, pages)."""
        table: Uint64s = self.base[:, None] + self.stride[:, None] * pages[None, :]
        return table


def _uint64(values: object) -> Uint64s:
    return np.fromiter(values, np.uint64)  # type: ignore[call-overload,no-any-return]  # iterables


def layer_layout(
    address: int, shape: Sequence[int], strides: Sequence[int], itemsize: int, num_pages: int
) -> LayerLayout:
    """Describe a strided array whose first axis counts blocks.

    Args:
        address: Of element 0.
        shape: (blocks, ...) as torch or numpy give it.
        strides: In elements, same length as `shape`.
        itemsize: Bytes of an element.
        num_pages: Pages in the framework's block table. A multiple of it may be `shape[0]`: some
            attention kernels cut one page into several blocks.

    Raises:
        ValueError: When blocks do not divide into pages, or an axis is broadcast.
    """
    blocks = shape[0]
    if num_pages <= 0 or blocks % num_pages:
        raise ValueError(f"{blocks} kernel blocks do not divide into {num_pages} pages")
    per_page = blocks // num_pages
    # A page is `per_page` blocks; all axes but the page axis, outermost first.
    axes = [(n, s) for n, s in zip(shape[1:], strides[1:], strict=True) if n > 1]
    if per_page > 1:
        axes.append((per_page, strides[0]))
    if any(s <= 0 for _, s in axes):
        raise ValueError(
            f"strides {tuple(strides)} of shape {tuple(shape)} are not those of a cache"
        )
    axes.sort(key=lambda axis: axis[1])
    run = 1  # elements that are dense from the innermost axis outwards
    while axes and axes[0][1] == run:
        run *= axes.pop(0)[0]
    offsets = np.zeros(1, np.int64)
    for count, stride in reversed(axes):
        offsets = (offsets[:, None] + np.arange(count) * stride).ravel()
    return LayerLayout(
        address=address,
        page_stride=strides[0] * per_page * itemsize,
        piece_bytes=run * itemsize,
        piece_offsets=tuple(int(o) * itemsize for o in np.sort(offsets)),
        pages=num_pages,
    )
