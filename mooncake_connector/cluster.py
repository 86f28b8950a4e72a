"""What a node publishes about itself, and the servers that follow from all records. Pure.

A record lives at `nodes/<engine_id>/<rank>` of the metadata store, leased: it goes with its node.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import quote

import msgspec

from mooncake_connector.errors import WireError

if TYPE_CHECKING:
    from collections.abc import Iterable

#: Prefix of all node records in the metadata store.
NODES = "nodes/"

Role = Literal["kv_producer", "kv_consumer", "kv_both"]


class NodeRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One worker rank. JSON, so that `etcdctl get` shows it; unknown fields are ignored.

    Attributes:
        engine_id: The framework's id of the engine that the rank belongs to.
        rank: Tensor-parallel rank, 0 <= rank < tp_size.
        tp_size: How many ranks the engine has; it can be routed to when all have published.
        role: What the engine does with KV caches.
        control: "host:port" of the node's control endpoint.
        incarnation: Random per start of the node.
        framework: "vllm" or "sglang".
        version: The framework's version.
        http_url: Base URL of the engine's API server, e.g. "http://10.0.0.1:8100"; "" when the
            node does not know it. One rank of the engine that knows it is enough.
        dp_rank: Which of the engines behind that API server, for data parallelism.
        route: An SGLang prefill rank's row for its bootstrap server (`sglang/routes.py`).
    """

    engine_id: str
    rank: Annotated[int, msgspec.Meta(ge=0)]
    tp_size: Annotated[int, msgspec.Meta(ge=1)]
    role: Role
    control: str
    incarnation: str
    framework: str
    version: str
    http_url: str = ""
    dp_rank: Annotated[int, msgspec.Meta(ge=0)] = 0
    route: dict[str, Any] | None = None


class Engine(msgspec.Struct, frozen=True):
    """One engine behind an API server: what decode needs to reach each of its ranks."""

    engine_id: str
    dp_rank: int
    controls: tuple[str, ...]  # by tensor-parallel rank
    incarnations: tuple[str, ...]  # ditto


class Listing(msgspec.Struct, frozen=True, kw_only=True):
    """One API server that requests can be sent to.

    Attributes:
        url: Base URL without a trailing slash.
        prefill: Whether it computes KV for others.
        decode: Whether it reads KV from others.
        engines: By data-parallel rank; empty when only the bootstrap server knows them.
        bootstrap: URL of its bootstrap server, "" when `engines` says it all.
    """

    url: str
    prefill: bool
    decode: bool
    engines: tuple[Engine, ...] = ()
    bootstrap: str = ""


def node_key(engine_id: str, rank: int) -> str:
    """Where the record of that rank is published. A slash in the id does not add a level."""
    return f"{node_keys(engine_id)}{rank}"


def node_keys(engine_id: str) -> str:
    """What the keys of all ranks of an engine begin with."""
    return f"{NODES}{quote(engine_id, safe='')}/"


def encode_node(record: NodeRecord) -> bytes:
    """The published form."""
    return msgspec.json.encode(record)


def decode_node(key: str, value: bytes) -> NodeRecord:
    """The record at `key`.

    Raises:
        WireError: When it is not a node record; the message names the key and the field.
    """
    try:
        return msgspec.json.decode(value, type=NodeRecord)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise WireError(f"{key} holds no node record of ours: {exc}") from exc


def listings(records: Iterable[NodeRecord]) -> dict[str, Listing]:
    """The API servers, by URL, of the engines whose ranks have all published.

    Not SGLang's: what our proxy adds to a request is vLLM's; SGLang has a router of its own.
    """
    ranks: dict[str, dict[int, NodeRecord]] = {}
    for record in records:
        if record.framework == "sglang":
            continue
        ranks.setdefault(record.engine_id, {})[record.rank] = record
    engines: dict[str, list[tuple[Engine, Role]]] = {}
    for engine_id, by_rank in ranks.items():
        first = min(by_rank.values(), key=lambda record: record.rank)
        url = next((record.http_url for record in by_rank.values() if record.http_url), "")
        if not url or set(by_rank) != set(range(first.tp_size)):
            continue
        ordered = [by_rank[rank] for rank in range(first.tp_size)]
        engine = Engine(
            engine_id,
            first.dp_rank,
            tuple(record.control for record in ordered),
            tuple(record.incarnation for record in ordered),
        )
        engines.setdefault(url.rstrip("/"), []).append((engine, first.role))
    return {
        url: Listing(
            url=url,
            prefill=any(role != "kv_consumer" for _, role in found),
            decode=any(role != "kv_producer" for _, role in found),
            engines=tuple(sorted((engine for engine, _ in found), key=lambda e: e.dp_rank)),
        )
        for url, found in engines.items()
    }
