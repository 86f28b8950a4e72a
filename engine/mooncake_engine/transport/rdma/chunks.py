"""Where a region is cut that is longer than one registration may be. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mooncake_engine.errors import PathUnavailable

if TYPE_CHECKING:
    from mooncake_engine.types import Region

_HUGE, _SMALL = 2 << 20, 4 << 10  # the host's page sizes: one that straddles is pinned twice


def cut(region: Region, limit: int) -> list[tuple[int, int]]:
    """(address, length) of each chunk, in order; together they are the region.

    No page of the region (`Region.page_bytes`, counted from its start) straddles two chunks: its
    one work request would need two keys and become two.

    Args:
        region: What is to be registered.
        limit: Bytes that one registration may have, > 0.

    Raises:
        PathUnavailable: One page is longer than that.
    """
    if region.length <= limit:
        return [(region.address, region.length)]
    unit = region.page_bytes or (_HUGE if limit >= _HUGE else min(_SMALL, limit))
    if unit > limit:
        raise PathUnavailable(
            f"cannot register {region.length} bytes at {region.address:#x}: one registration may "
            f"have {limit} bytes and one page has {unit}; raise MC_MAX_MR_SIZE (rdma.max_mr_bytes) "
            "if it says so, else make pages of fewer tokens (--block-size, --page-size)"
        )
    step = limit // unit * unit
    end = region.address + region.length
    return [(at, min(step, end - at)) for at in range(region.address, end, step)]
