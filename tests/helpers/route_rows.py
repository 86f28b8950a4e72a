"""Rows as SGLang's prefill ranks register them, with our fields."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mooncake_connector.cluster import NodeRecord, encode_node

if TYPE_CHECKING:
    from collections.abc import Sequence

ALL = (-1, -1, -1, -1)


def body(rank: int = 0, **changes: object) -> dict[str, Any]:
    """What rank `rank` of a tensor-parallel server PUTs; any field can be another."""
    row = {
        "attn_tp_size": 1,
        "attn_tp_rank": rank,
        "attn_cp_size": 1,
        "attn_cp_rank": 0,
        "attn_dp_size": 1,
        "attn_dp_rank": 0,
        "pp_size": 1,
        "pp_rank": 0,
        "system_dp_size": 1,
        "system_dp_rank": 0,
        "rank_ip": "127.0.0.1",
        "rank_port": 7000 + rank,
        "page_size": 64,
        "kv_cache_dtype": "bfloat16",
        "kv_layout": None,
        "dsv41_spec_layout": None,
        "load_balance_method": "round_robin",
        "enable_dsa_cache_layer_split": False,
        "enable_kv_cache_sharding": False,
        "prefill_http_port": 30000,
        "decode_allocation_policy": "early",
        "incarnation": f"i{rank}",
        "engine_id": "127.0.0.1:8998",
        "rank": rank,
    }
    return row | changes


def server(tp: int, **changes: object) -> list[dict[str, Any]]:
    """The rows of all ranks of a server."""
    return [body(rank, attn_tp_size=tp, **changes) for rank in range(tp)]


def place(row: dict[str, Any]) -> dict[str, Any]:
    """What `GET /route` says of that rank."""
    return {
        name: row[name] for name in ("rank_ip", "rank_port", "incarnation", "engine_id", "rank")
    }


def query(position: Sequence[int]) -> dict[str, int]:
    """The parameters of `GET /route` for (data, context, tensor, pipeline) rank."""
    names = ("prefill_dp_rank", "prefill_cp_rank", "target_tp_rank", "target_pp_rank")
    return dict(zip(names, position, strict=True))


def record(row: dict[str, Any] | None, **changes: object) -> bytes:
    """The node record of a rank with that row."""
    fields: dict[str, Any] = {
        "engine_id": "127.0.0.1:8998",
        "rank": row["rank"] if row else 0,
        "tp_size": 1,
        "role": "kv_producer",
        "control": "127.0.0.1:7000",
        "incarnation": row["incarnation"] if row else "i",
        "framework": "sglang",
        "version": "0.5.23",
        "route": row,
    }
    return encode_node(NodeRecord(**(fields | changes)))
