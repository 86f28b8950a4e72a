"""SGLang's `KVArgs` -> `CacheSpec` and `CacheLayout`, or why they cannot be moved.

Groups are: the KV pool; one for each component of a hybrid model's state; last, the rows of
metadata that carry a request's first token. SGLang gives one buffer per layer (for MHA all K, then
all V) and addresses it by page or row number, so every layer is one dense piece per page.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.disaggregation.base.conn import StateType
from sglang.srt.distributed.utils import get_pp_indices
from sglang.srt.runtime_context import get_device, get_parallel

from mooncake_connector.errors import UnsupportedCache
from mooncake_connector.layout import CacheLayout, CacheSpec, GroupSpec, LayerLayout
from mooncake_connector.model_digest import model_digest
from mooncake_connector.plan import PageRun

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray
    from sglang.srt.disaggregation.base.conn import KVArgs
    from sglang.srt.server_args import ServerArgs

#: Components whose rows are moved whole. The others name parts of rows.
ROWS = frozenset(StateType) - {StateType.DSA_TAIL}


def describe(
    args: KVArgs, server_args: ServerArgs, *, is_mla: bool
) -> tuple[CacheSpec, CacheLayout]:
    """What this rank's cache holds and where.

    Raises:
        UnsupportedCache: A cache that pages cannot be moved of, named.
    """
    parallel = get_parallel()
    model = ModelConfig.from_server_args(server_args)
    groups = [
        _group(
            "mla" if is_mla else "full",
            _layer_names(args, model.num_hidden_layers, is_mla=is_mla),
            args.kv_item_lens,
        )
    ]
    layouts = [_layers(args.kv_data_ptrs, args.kv_data_lens, args.kv_item_lens)]
    for number, kind in enumerate(args.state_types):
        if kind not in ROWS:
            raise UnsupportedCache(f"state of type {kind} cannot be moved yet")
        sizes = args.state_item_lens[number]
        groups.append(_group("state", _state_names(args, number), sizes))
        layouts.append(_layers(args.state_data_ptrs[number], args.state_data_lens[number], sizes))
    rows = [f"metadata {number}" for number in range(len(args.aux_item_lens))]
    groups.append(_group("metadata", rows, args.aux_item_lens))
    layouts.append(_layers(args.aux_data_ptrs, args.aux_data_lens, args.aux_item_lens))
    spec = CacheSpec(
        model=server_args.model_path.rstrip("/").rpartition("/")[2],
        model_digest=model_digest(
            model.hf_config.to_dict(),
            {"sglang.quantization": str(model.quantization), "sglang.dtype": str(model.dtype)},
        ),
        revision=server_args.revision or "",
        dtype=args.kv_cache_dtype_str,
        page_size=args.page_size,
        order=f"sglang/{args.kv_layout or 'nhd'}/{args.swa_kv_cache_layout or ''}".rstrip("/"),
        tp_rank=parallel.attn_tp_rank,
        tp_size=parallel.attn_tp_size,
        pp_rank=args.pp_rank,
        pp_size=parallel.pp_size,
        groups=tuple(groups),
    )
    return spec, CacheLayout(tuple(layouts))


def runs_of(
    args: KVArgs,
    first: int,
    kv_indices: NDArray[np.int32] | None,
    state_indices: Sequence[Any] | None,
    row: int | None,
) -> list[PageRun]:
    """One request's pages and rows, as SGLang's queues give them: a run per group of `describe`.

    Args:
        args: The cache's.
        first: Position of the first page of `kv_indices`.
        kv_indices: Pages in the KV pool; None: none of them.
        state_indices: For each component of the state, its rows; None: none of them.
        row: Of metadata.
    """
    states = state_indices or [None] * len(args.state_types)
    runs = [PageRun(first, _rows(kv_indices))]
    runs += [PageRun(0, _rows(rows)) for rows in states]
    runs.append(PageRun(0, _rows(None if row is None else [row])))
    return runs


def memory_of(args: KVArgs) -> list[tuple[int, int, str]]:
    """The buffers as (address, bytes, location), those that overlap as one."""
    device = get_device().device
    location = device if device == "cpu" else f"{device}:{args.gpu_id}"
    paged = list(zip(args.kv_data_ptrs, args.kv_data_lens, strict=True))
    for pointers, lengths in zip(args.state_data_ptrs, args.state_data_lens, strict=True):
        paged += zip(pointers, lengths, strict=True)
    rows = zip(args.aux_data_ptrs, args.aux_data_lens, strict=True)
    return [(*span, location) for span in _joined(paged)] + [
        (*span, "cpu") for span in _joined(rows)
    ]


def _joined(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for start, length in sorted(spans):
        if joined and start < sum(joined[-1]):
            first = joined[-1][0]
            joined[-1] = first, max(sum(joined[-1]), start + length) - first
        else:
            joined.append((start, length))
    return joined


def _group(kind: str, names: Sequence[str], sizes: Sequence[int]) -> GroupSpec:
    return GroupSpec(kind=kind, layers=tuple(names), page_bytes=tuple(sizes))  # type: ignore[arg-type]  # one of its literals


def _layers(
    pointers: Sequence[int], lengths: Sequence[int], sizes: Sequence[int]
) -> tuple[LayerLayout, ...]:
    return tuple(
        LayerLayout(
            address=pointer,
            page_stride=size,
            piece_bytes=size,
            piece_offsets=(0,),
            pages=length // size,
        )
        for pointer, length, size in zip(pointers, lengths, sizes, strict=True)
    )


def _layer_names(args: KVArgs, layers: int, *, is_mla: bool) -> list[str]:
    """Names that a pipeline stage and a server without stages have in common."""
    drafts = getattr(args, "num_draft_entries", 0)
    own = len(args.kv_data_ptrs) - drafts
    if args.kv_layer_ids:
        numbers = list(args.kv_layer_ids[:own])
    else:
        parts = 1 if is_mla or own % 2 else 2  # K and V
        first = getattr(args, "prefill_start_layer", None)
        if first is None:
            first = get_pp_indices(layers, args.pp_rank, get_parallel().pp_size)[0]
        numbers = [first + number for number in range(own // parts)] * parts
    return [*_numbered("layer", numbers), *(f"draft {number}" for number in range(drafts))]


def _state_names(args: KVArgs, component: int) -> list[str]:
    kind = args.state_types[component].value
    count = len(args.state_data_ptrs[component])
    known = args.state_layer_ids[component] if component < len(args.state_layer_ids) else []
    if known:
        return _numbered(kind, known)
    # Without numbers of its layers a stage's state cannot be told from another stage's.
    stage = f" of stage {args.pp_rank}" if get_parallel().pp_size > 1 else ""
    return [f"{kind} {number}{stage}" for number in range(count)]


def _numbered(what: str, numbers: Iterable[int]) -> list[str]:
    """One name per buffer; a layer has several: K and V, or parts of a state."""
    seen: Counter[int] = Counter()
    names = []
    for number in numbers:
        names.append(f"{what} {number} part {seen[number]}")
        seen[number] += 1
    return names


def _rows(indices: Any) -> NDArray[np.uint64]:  # noqa: ANN401 - lists, arrays, lists of arrays
    """Page or row numbers; none for None."""
    if indices is None or not len(indices):
        return np.zeros(0, np.uint64)
    if isinstance(indices, np.ndarray):
        return indices.ravel().astype(np.uint64)
    return np.concatenate([np.atleast_1d(part) for part in indices]).astype(np.uint64)
