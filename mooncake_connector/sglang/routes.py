"""What a bootstrap server knows of a prefill server's ranks, and its answers. Pure.

Rows and answers are SGLang's own (`CommonKVManager.register_to_bootstrap`, `PrefillServerInfo`),
so that its router and peers understand them; a row also names the rank's node.
"""

from __future__ import annotations

from typing import Any

import msgspec

from mooncake_connector.errors import WireError


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One rank, as it registers itself. Unknown fields are ignored."""

    attn_tp_size: int
    attn_tp_rank: int
    attn_cp_size: int
    attn_cp_rank: int
    attn_dp_size: int
    attn_dp_rank: int
    pp_size: int
    pp_rank: int
    system_dp_size: int
    system_dp_rank: int
    rank_ip: str
    rank_port: int
    page_size: int | None = None
    kv_cache_dtype: str | None = None
    kv_layout: str | None = None
    dsv41_spec_layout: dict[str, Any] | None = None
    load_balance_method: str = "follow_bootstrap_room"
    enable_dsa_cache_layer_split: bool = False
    enable_kv_cache_sharding: bool = False
    prefill_http_port: int | None = None
    decode_allocation_policy: str = "early"
    # Ours: whose node listens at rank_ip:rank_port.
    incarnation: str
    engine_id: str
    rank: int

    @property
    def key(self) -> tuple[int, int, int, int]:
        """(data-parallel, context-parallel, tensor-parallel, pipeline) rank."""
        group = self.attn_dp_rank if self.system_dp_size == 1 else self.system_dp_rank
        return group, self.attn_cp_rank, self.attn_tp_rank, self.pp_rank

    @property
    def groups(self) -> int:
        """Data-parallel size."""
        return self.attn_dp_size if self.system_dp_size == 1 else self.system_dp_size

    @property
    def ranks(self) -> int:
        """How many rows the server has."""
        return self.groups * self.attn_cp_size * self.attn_tp_size * self.pp_size


#: What all ranks of one server have in common.
_SHARED = (
    *("attn_tp_size", "attn_cp_size", "attn_dp_size", "pp_size", "system_dp_size"),
    *("page_size", "kv_cache_dtype", "kv_layout", "dsv41_spec_layout", "load_balance_method"),
    *("enable_dsa_cache_layer_split", "enable_kv_cache_sharding", "decode_allocation_policy"),
)


class RouteTable:
    """The rows of one prefill server. Not thread-safe."""

    def __init__(self) -> None:
        self._rows: dict[tuple[int, int, int, int], Row] = {}

    def add(self, row: Row) -> None:
        """A rank registered; one that was here before is replaced, it has restarted.

        Rows that contradict it are of a server that restarted with other settings: they go.
        """
        self._rows = {key: known for key, known in self._rows.items() if not differing(known, row)}
        self._rows[row.key] = row

    def remove(self, rank: int) -> None:
        """That rank of the server is gone."""
        self._rows = {key: row for key, row in self._rows.items() if row.rank != rank}

    def missing(self) -> str:
        """Why there is no topology yet, "" when there is."""
        if not self._rows:
            return "no prefill rank has registered yet"
        expected = next(iter(self._rows.values())).ranks
        if len(self._rows) < expected:
            return f"{len(self._rows)} of {expected} prefill ranks have registered"
        return ""

    def topology(self) -> dict[str, Any]:
        """What `GET /route` answers to all -1: SGLang's `PrefillServerInfo`. Nothing is missing."""
        first = self._rows[min(self._rows)]
        answer = {
            "attn_tp_size": first.attn_tp_size,
            "attn_cp_size": first.attn_cp_size,
            "dp_size": first.groups,
            "pp_size": first.pp_size,
            "page_size": first.page_size,
            "kv_cache_dtype": first.kv_cache_dtype,
            "follow_bootstrap_room": first.load_balance_method == "follow_bootstrap_room",
            "enable_dsa_cache_layer_split": first.enable_dsa_cache_layer_split,
            "enable_kv_cache_sharding": first.enable_kv_cache_sharding,
            "prefill_http_port": first.prefill_http_port,
            "decode_allocation_policy": first.decode_allocation_policy,
        }
        # SGLang leaves these out where a pool has only one layout.
        for name in ("kv_layout", "dsv41_spec_layout"):
            if getattr(first, name) is not None:
                answer[name] = getattr(first, name)
        return answer

    def rank(self, key: tuple[int, int, int, int]) -> dict[str, Any] | None:
        """Where one rank's node is; None when there is no such rank."""
        row = self._rows.get(key)
        if row is None:
            return None
        return {
            "rank_ip": row.rank_ip,
            "rank_port": row.rank_port,
            "incarnation": row.incarnation,
            "engine_id": row.engine_id,
            "rank": row.rank,
        }


def differing(one: Row, other: Row) -> list[str]:
    """Names of what two ranks of one server must have in common and have not."""
    return [name for name in _SHARED if getattr(one, name) != getattr(other, name)]


def decode_row(body: object) -> Row:
    """The row in a request's JSON body or in a node record.

    Raises:
        WireError: When it is none; the message names the field.
    """
    try:
        return msgspec.convert(body, Row)
    except msgspec.ValidationError as exc:
        raise WireError(f"not a prefill rank's registration: {exc}") from exc
