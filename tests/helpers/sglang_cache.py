"""Memory of one SGLang scheduler rank for tests: numpy rows, described to a backend by `KVArgs`.

A row is a page of one layer's K or V, a row of a hybrid model's state, or a request's metadata.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
from sglang.srt.disaggregation.base.conn import KVArgs, StateType
from sglang.srt.disaggregation.utils import append_state_component
from sglang.srt.distributed.utils import get_pp_indices
from sglang.srt.runtime_context import get_disagg, get_parallel

if TYPE_CHECKING:
    from sglang_ranks import Options

PAGES, PAGE_BYTES = 48, 4096
STATE_ROWS, STATE_BYTES = 16, 512
AUX_ROWS, AUX_BYTES = 8, 64


class Cache:
    """A rank's buffers by name, the same on prefill and decode: "layer 0 K", "swa 0", "aux 1"."""

    def __init__(self, options: Options) -> None:
        """Random bytes where `options.seed` is given, else zeros."""
        parallel = get_parallel()
        first, end = get_pp_indices(options.layers, parallel.pp_rank, parallel.pp_size)
        parts = [""] if options.mla else [" K", " V"]
        page_bytes = PAGE_BYTES * options.page_size // 4
        self.kv = {
            f"layer {n}{part}": np.zeros((PAGES, page_bytes), np.uint8)
            for part in parts
            for n in range(first, end)
        }
        self.states = [
            {
                f"{kind} {n}": np.zeros((STATE_ROWS, STATE_BYTES), np.uint8)
                for n in range(first, end)
            }
            for kind in options.states
        ]
        self.aux = {f"aux {n}": np.zeros((AUX_ROWS, AUX_BYTES), np.uint8) for n in range(2)}
        if options.seed is not None:
            random = np.random.default_rng(options.seed)
            for buffer in (*self.kv.values(), *self.aux.values(), *self._state_buffers()):
                buffer[:] = random.integers(1, 256, buffer.shape, np.uint8)
        self.args = self._describe(options, first)

    def _state_buffers(self) -> list[np.ndarray]:
        return [buffer for component in self.states for buffer in component.values()]

    def _describe(self, options: Options, first_layer: int) -> KVArgs:
        """What SGLang's queues tell a backend of their pools (`_init_kv_manager`)."""
        parallel = get_parallel()
        args = KVArgs()
        args.engine_rank = parallel.tp_rank
        if options.role == "decode":
            args.engine_rank %= parallel.attn_tp_size
        else:
            args.prefill_start_layer = first_layer
        args.pp_rank = parallel.pp_rank
        args.system_dp_rank = parallel.dp_rank
        args.kv_cache_dtype_str = options.dtype
        args.kv_layout = options.kv_layout
        args.page_size = options.page_size
        args.kv_layer_ids = []
        args.num_draft_entries = 0
        args.kv_data_ptrs, args.kv_data_lens, args.kv_item_lens = _infos(self.kv)
        args.aux_data_ptrs, args.aux_data_lens, args.aux_item_lens = _infos(self.aux)
        args.state_types, args.state_layer_ids = [], []
        args.state_data_ptrs, args.state_data_lens, args.state_item_lens = [], [], []
        args.state_dim_per_tensor, args.state_slice_outer_counts = [], []
        args.state_conv_shard_groups = []
        args.is_hybrid_mla_backend = False
        args.swa_kv_cache_layout = None
        for kind, component in zip(options.states, self.states, strict=True):
            layers = [int(name.split()[1]) for name in component]
            append_state_component(args, StateType(kind), *_infos(component), layer_ids=layers)
        args.ib_device = get_disagg().disaggregation_ib_device
        args.gpu_id = 0
        return args

    def digests(self, pages: list[int], states: list[list[int]]) -> dict[str, str]:
        """Buffer's name -> hash of these pages or rows of it."""
        found = {name: _digest(buffer[pages]) for name, buffer in self.kv.items()}
        for rows, component in zip(states, self.states, strict=True):
            found |= {name: _digest(buffer[rows]) for name, buffer in component.items()}
        return found

    def metadata(self, row: int) -> list[str]:
        """A hash for each metadata buffer's row; "" while nothing was written there."""
        rows = [buffer[row] for buffer in self.aux.values()]
        return [_digest(row) if row.any() else "" for row in rows]

    def fill(self, value: int, rows: list[int] | None = None) -> None:
        """Write one value into all pages, or into these, and into no other memory."""
        for buffer in self.kv.values():
            buffer[slice(None) if rows is None else rows] = value


def _digest(rows: np.ndarray) -> str:
    return hashlib.blake2b(rows.tobytes(), digest_size=8).hexdigest()


def _infos(buffers: dict[str, np.ndarray]) -> tuple[list[int], list[int], list[int]]:
    arrays = list(buffers.values())
    pointers = [int(array.__array_interface__["data"][0]) for array in arrays]
    return pointers, [array.nbytes for array in arrays], [array[0].nbytes for array in arrays]
