from __future__ import annotations

import json

import msgspec
import pytest

from mooncake_connector.cluster import (
    Engine,
    Listing,
    NodeRecord,
    Role,
    decode_node,
    encode_node,
    listings,
    node_key,
)
from mooncake_connector.errors import WireError


def node(
    engine_id: str = "e",
    rank: int = 0,
    tp_size: int = 1,
    role: Role = "kv_producer",
    http_url: str = "http://p:1",
    dp_rank: int = 0,
) -> NodeRecord:
    return NodeRecord(
        engine_id=engine_id,
        rank=rank,
        tp_size=tp_size,
        role=role,
        control=f"{engine_id}:{rank}",
        incarnation=f"i{rank}",
        framework="vllm",
        version="0.32.0",
        http_url=http_url,
        dp_rank=dp_rank,
    )


def test_a_record_survives_publishing() -> None:
    assert decode_node("nodes/e/0", encode_node(node())) == node()


def test_a_field_of_a_newer_version_is_ignored() -> None:
    value = json.dumps({**json.loads(encode_node(node())), "colour": "red"}).encode()
    assert decode_node("nodes/e/0", value) == node()


@pytest.mark.parametrize("value", [b"\xff", b"[]", b'{"engine_id": "e"}', b'{"rank": -1}'])
def test_what_is_no_record_is_refused_by_its_key(value: bytes) -> None:
    with pytest.raises(WireError, match="nodes/e/0 holds no node record"):
        decode_node("nodes/e/0", value)


def test_a_slash_in_an_engine_id_does_not_add_a_level() -> None:
    assert node_key("a/b", 3) == "nodes/a%2Fb/3"


def test_an_engine_is_listed_when_all_its_ranks_have_published() -> None:
    ranks = [node(rank=1, tp_size=2, http_url=""), node(rank=0, tp_size=2)]
    assert listings(ranks[:1]) == listings(ranks[1:]) == {}
    engine = Engine("e", 0, ("e:0", "e:1"), ("i0", "i1"))
    assert listings(ranks) == {
        "http://p:1": Listing(url="http://p:1", prefill=True, decode=False, engines=(engine,))
    }


def test_an_engine_without_a_url_is_not_listed() -> None:
    assert listings([node(http_url="")]) == {}


def test_an_sglang_server_is_not_offered_to_the_proxy() -> None:
    assert listings([msgspec.structs.replace(node(), framework="sglang")]) == {}


def test_data_parallel_engines_share_one_server_in_the_order_of_their_ranks() -> None:
    found = listings([node("b", dp_rank=1), node("a", dp_rank=0, http_url="http://p:1/")])
    assert [engine.engine_id for engine in found["http://p:1"].engines] == ["a", "b"]


@pytest.mark.parametrize(
    ("role", "prefill", "decode"),
    [("kv_producer", True, False), ("kv_consumer", False, True), ("kv_both", True, True)],
)
def test_the_role_says_which_requests_a_server_gets(
    role: Role, prefill: bool, decode: bool
) -> None:
    found = listings([node(role=role)])["http://p:1"]
    assert (found.prefill, found.decode) == (prefill, decode)
