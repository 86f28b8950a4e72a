"""vLLM's KV cache tensors -> `CacheSpec` and `CacheLayout`, or why they cannot be moved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from vllm.distributed.kv_transfer.kv_connector.utils import get_current_attn_backends
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from mooncake_connector.errors import UnsupportedCache
from mooncake_connector.layout import CacheLayout, CacheSpec, GroupSpec, LayerLayout, layer_layout
from mooncake_connector.model_digest import model_digest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, KVCacheSpec


def describe(
    vllm_config: VllmConfig,
    kv_cache_config: KVCacheConfig,
    kv_caches: Mapping[str, torch.Tensor],
    tp_rank: int,
) -> tuple[CacheSpec, CacheLayout]:
    """What this rank's cache holds and where.

    Raises:
        UnsupportedCache: A cache that pages cannot be moved of as whole blocks, named.
    """
    page_size = vllm_config.cache_config.block_size
    specs, layouts = [], []
    for group in kv_cache_config.transfer_groups:
        if group.kv_cache_spec.block_size != page_size:
            raise UnsupportedCache(
                f"KV cache group of {group.layer_names[0]} has {group.kv_cache_spec.block_size} "
                f"tokens per block, others {page_size}; hybrid block sizes are not supported yet"
            )
        layers = [
            _layer(name, kv_caches.get(name), kv_cache_config.num_blocks)
            for name in group.layer_names
        ]
        kind, window = _kind(group)
        specs.append(
            GroupSpec(
                kind=kind,
                window=window,
                layers=tuple(group.layer_names),
                page_bytes=tuple(layer.page_bytes for layer in layers),
            )
        )
        layouts.append(tuple(layers))
    model = vllm_config.model_config
    dtype = vllm_config.cache_config.cache_dtype
    spec = CacheSpec(
        model=model.model.rstrip("/").rpartition("/")[2],
        model_digest=model_digest(
            model.hf_config.to_dict(),
            {"vllm.quantization": str(model.quantization), "vllm.dtype": str(model.dtype)},
        ),
        revision=model.revision or "",
        dtype=str(model.dtype).removeprefix("torch.") if dtype == "auto" else str(dtype),
        page_size=page_size,
        order=_order(vllm_config),
        tp_rank=tp_rank,
        tp_size=vllm_config.parallel_config.tensor_parallel_size,
        groups=tuple(specs),
    )
    return spec, CacheLayout(tuple(layouts))


def memory_of(kv_caches: Mapping[str, torch.Tensor]) -> list[tuple[int, int, str]]:
    """The caches' storages as (address, bytes, location), each once: layers share them."""
    storages = {}
    for tensor in kv_caches.values():
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = (storage.data_ptr(), storage.nbytes(), str(tensor.device))
    return list(storages.values())


def _layer(name: str, tensor: torch.Tensor | None, num_blocks: int) -> LayerLayout:
    if not isinstance(tensor, torch.Tensor):
        raise UnsupportedCache(
            f"layer {name} has {type(tensor).__name__} instead of one KV cache tensor (state of a "
            "recurrent layer?); only attention caches are supported"
        )
    try:
        return layer_layout(
            tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.element_size(), num_blocks
        )
    except ValueError as exc:
        raise UnsupportedCache(f"layer {name}: {exc}") from exc


def _kind(group: KVCacheGroupSpec) -> tuple[Literal["full", "mla", "window"], int]:
    spec: KVCacheSpec = group.kv_cache_spec
    inner = getattr(spec, "kv_cache_specs", None)  # UniformTypeKVCacheSpecs
    if inner:
        spec = next(iter(inner.values()))
    if isinstance(spec, MLAAttentionSpec):
        return "mla", 0
    if isinstance(spec, SlidingWindowSpec):
        return "window", spec.sliding_window
    if isinstance(spec, FullAttentionSpec) and not isinstance(spec, ChunkedLocalAttentionSpec):
        return "full", 0
    raise UnsupportedCache(
        f"KV cache group of {group.layer_names[0]} is a {type(spec).__name__}; full, MLA and "
        "sliding-window attention are supported"
    )


def _order(vllm_config: VllmConfig) -> str:
    """How bytes lie inside a page: the backend decides, its layout name and instruction set too."""
    backends = sorted({b.get_name() for b in get_current_attn_backends(vllm_config)})
    order = f"{'+'.join(backends)}/{vllm_config.cache_config.kv_cache_layout}"
    if backends == ["CPU_ATTN"] and vllm_config.model_config.dtype is torch.bfloat16:
        # Its AMX kernels pack keys otherwise than its vector kernels.
        amx = torch.cpu._is_amx_tile_supported()  # noqa: SLF001  # vLLM asks torch the same way
        order += "/amx" if amx else "/vec"
    return order
