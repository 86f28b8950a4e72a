"""Stands in for `sgl_kernel` where SGLang runs on a CPU in tests. Users need none of it.

The wheels of sgl-kernel hold CUDA kernels, and its CPU build is not published. Without AMX, SGLang
computes everything with torch; these names are all that it imports from here when it starts, and
none is called by what our tests do: most belong to speculative decoding. There are no submodules:
SGLang goes on without those.
"""

from __future__ import annotations

from typing import NoReturn

__version__ = "0.0.0+standin"


def _missing(*_: object, **__: object) -> NoReturn:
    raise NotImplementedError("this stand-in for sgl_kernel has names to import, and no kernels")


assign_draft_cache_locs_contiguous_cpu = _missing
assign_extend_cache_locs_cpu = _missing
assign_req_to_token_pool_cpu = _missing
build_tree_kernel_efficient_cpu = _missing
copy_all_layer_kv_cache_cpu = _missing
fill_accept_out_cache_loc_cpu = _missing
fill_bonus_tokens_cpu = _missing
rotate_input_ids_cpu = _missing
verify_tree_greedy_cpu = _missing
