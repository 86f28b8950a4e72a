"""What a bootstrap server knows of a prefill server's ranks, and its answers. Pure.

Rows and answers are SGLang's own (`CommonKVManager.register_to_bootstrap`, `PrefillServerInfo`),
so that its router and peers understand them; a row also names the rank's node.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from mooncake_connector.errors import ConnectorError, WireError

if TYPE_CHECKING:
    from collections.abc import Iterable

Size = Annotated[int, msgspec.Meta(ge=1)]
Rank = Annotated[int, msgspec.Meta(ge=0)]
#: (data-parallel, context-parallel, tensor-parallel, pipeline) rank.
Position = tuple[int, int, int, int]


class RouteConflict(ConnectorError):
    """Two ranks of one prefill server were started with different settings."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One rank, as it registers itself. Unknown fields are ignored.

    Attributes:
        rank_ip: Where the rank's node listens.
        rank_port: Ditto.
        incarnation: Random per start of the node.
        engine_id: The same in all ranks of a server.
        rank: This rank's number among all of its server's ranks.
    """

    attn_tp_size: Size
    attn_tp_rank: Rank
    attn_cp_size: Size
    attn_cp_rank: Rank
    attn_dp_size: Size
    attn_dp_rank: Rank
    pp_size: Size
    pp_rank: Rank
    system_dp_size: Size
    system_dp_rank: Rank
    rank_ip: str
    rank_port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    page_size: Size
    kv_cache_dtype: str | None = None
    kv_layout: str | None = None
    dsv41_spec_layout: dict[str, Any] | None = None
    load_balance_method: str = "follow_bootstrap_room"
    enable_dsa_cache_layer_split: bool = False
    enable_kv_cache_sharding: bool = False
    prefill_http_port: int | None = None
    decode_allocation_policy: str = "early"
    incarnation: str
    engine_id: str
    rank: Rank

    def __post_init__(self) -> None:
        """A rank outside of its group would count towards a topology that lacks another."""
        names = ("data-parallel", "context-parallel", "tensor-parallel", "pipeline")
        sizes = (self.groups, self.attn_cp_size, self.attn_tp_size, self.pp_size)
        for name, rank, size in zip(names, self.position, sizes, strict=True):
            if rank >= size:
                raise ValueError(f"{name} rank {rank} is not below the size {size}")

    @property
    def position(self) -> Position:
        """Which rank it is."""
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
#: Fields of `PrefillServerInfo` that decode fills in for itself; SGLang's server sends them, too.
_DECODES_OWN = (
    *("target_tp_rank", "target_tp_ranks", "target_cp_ranks", "target_pp_ranks"),
    *("required_dst_info_num", "required_prefill_response_num"),
)


class RouteTable:
    """The rows of one start of one prefill server; they agree. Not thread-safe."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self._rows = {row.position: row for row in rows}

    def __len__(self) -> int:
        """How many ranks are known."""
        return len(self._rows)

    def add(self, row: Row) -> None:
        """A rank registered. One that was here before is replaced.

        If that was another incarnation, the server has restarted: rows that contradict the new
        one are of the start before, and go.

        Raises:
            RouteConflict: It contradicts another rank, and no restart explains it. After a
                restart on more ranks this is so until a rank comes that was here before.
        """
        before = self._rows.get(row.position)
        restarted = before is not None and before.incarnation != row.incarnation
        agreeing = {}
        for position, known in self._rows.items():
            names = differing(known, row)
            if not names:
                agreeing[position] = known
            elif not restarted and position != row.position:
                raise RouteConflict(_contradiction(known, row, names[0]))
        self._rows = agreeing | {row.position: row}

    def missing(self) -> str:
        """Why there is no topology yet, "" when there is."""
        if not self._rows:
            return "no prefill rank has registered yet"
        expected = next(iter(self._rows.values())).ranks
        if len(self._rows) < expected:
            return f"{len(self._rows)} of {expected} prefill ranks have registered"
        return ""

    def topology(self) -> dict[str, Any] | None:
        """SGLang's `PrefillServerInfo`, with the keys that its own server answers.

        None until every rank is here.
        """
        if self.missing():
            return None
        first = self._rows[min(self._rows)]
        answer: dict[str, Any] = {
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
        return answer | dict.fromkeys(_DECODES_OWN)

    def rank(self, position: Position) -> dict[str, Any] | None:
        """Where one rank's node is, and whose it is; None when there is no such rank."""
        row = self._rows.get(position)
        if row is None:
            return None
        return {
            "rank_ip": row.rank_ip,
            "rank_port": row.rank_port,
            "incarnation": row.incarnation,
            "engine_id": row.engine_id,
            "rank": row.rank,
        }


def of_one_start(rows: Iterable[Row]) -> tuple[RouteTable, str]:
    """Sort out rows of which some may be left from the server's start before, in any order.

    Each must have a `rank` of its own, as it has in the metadata store: then all starts share
    rank 0, and at most one of them is complete.

    Returns:
        The complete start, else the one with most ranks; and how another one contradicts it, "" if
        there is none or it does not matter.
    """
    starts: list[list[Row]] = []
    for row in rows:
        start = next((start for start in starts if not differing(start[0], row)), None)
        if start is None:
            starts.append([row])
        else:
            start.append(row)
    starts.sort(key=lambda start: (len(start) == start[0].ranks, len(start)), reverse=True)
    table = RouteTable(starts[0] if starts else ())
    if len(starts) < 2 or not table.missing():
        return table, ""
    one, other = starts[0][0], starts[1][0]
    return table, _contradiction(one, other, differing(one, other)[0])


def differing(one: Row, other: Row) -> list[str]:
    """Names of what two ranks of one server must have in common and have not."""
    return [name for name in _SHARED if getattr(one, name) != getattr(other, name)]


def decode_row(body: object) -> Row:
    """The row in a node record.

    Raises:
        WireError: When it is none; the message names the field.
    """
    try:
        return msgspec.convert(body, Row)
    except msgspec.ValidationError as exc:
        raise WireError(f"not a prefill rank's registration: {exc}") from exc


def _contradiction(one: Row, other: Row, name: str) -> str:
    return (
        f"{name} is {getattr(one, name)!r} in prefill rank {one.rank} ({one.rank_ip}) and "
        f"{getattr(other, name)!r} in rank {other.rank} ({other.rank_ip}); "
        "start all ranks of a server with the same settings"
    )
