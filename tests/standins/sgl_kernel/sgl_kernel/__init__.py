"""Stands in for `sgl_kernel` where SGLang runs on a CPU in tests. Users need none of it.

The wheels of sgl-kernel hold CUDA kernels, and its CPU build is not published. Without AMX, SGLang
computes everything with torch; these names are all that it imports from here when it starts. The
first two are its own allocator's, in plain torch; the others belong to speculative decoding, which
our tests do not use, and raise. There are no submodules: SGLang goes on without those.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from torch import Tensor

__version__ = "0.0.0+standin"


def copy_all_layer_kv_cache_cpu(
    addresses: Tensor, row_bytes: Tensor, targets: Tensor, sources: Tensor
) -> None:
    """Copy rows `sources` to rows `targets` in the buffer of every layer; rows may overlap."""
    for address, nbytes in zip(addresses.tolist(), row_bytes.tolist(), strict=True):
        rows = [ctypes.string_at(address + row * nbytes, nbytes) for row in sources.tolist()]
        for target, row in zip(targets.tolist(), rows, strict=True):
            ctypes.memmove(address + target * nbytes, row, nbytes)


def assign_req_to_token_pool_cpu(
    requests: Tensor, table: Tensor, starts: Tensor, ends: Tensor, slots: Tensor, _width: int
) -> None:
    """Write each request's new slots, which lie one behind the other in `slots`, to its row."""
    taken = 0
    for request, start, end in zip(requests.tolist(), starts.tolist(), ends.tolist(), strict=True):
        table[request, start:end] = slots[taken : taken + end - start].to(table.dtype)
        taken += end - start


def _speculative_decoding(*_: object, **__: object) -> NoReturn:
    raise NotImplementedError("speculative decoding is not in this stand-in for sgl_kernel")


assign_draft_cache_locs_contiguous_cpu = _speculative_decoding
assign_extend_cache_locs_cpu = _speculative_decoding
build_draft_decode_metadata_cpu = _speculative_decoding
build_tree_kernel_efficient_cpu = _speculative_decoding
fill_accept_out_cache_loc_cpu = _speculative_decoding
fill_bonus_tokens_cpu = _speculative_decoding
rotate_input_ids_cpu = _speculative_decoding
verify_tree_greedy_cpu = _speculative_decoding
