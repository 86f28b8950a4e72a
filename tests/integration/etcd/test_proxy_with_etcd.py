"""The proxy follows real etcd: servers come with their nodes and go with their nodes' deaths."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from proxy_stage import ASK, Stage, record, watched

from mooncake_connector.cluster import encode_node, node_key

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    from etcd_stage import EtcdServer, Stores
    from mooncake_engine.metadata.base import MetadataStore

    Publish = Callable[[str, str, str], subprocess.Popen[str]]


def test_a_killed_node_takes_its_server_out_and_a_new_one_brings_it_back(
    etcd: EtcdServer, stores: Stores, publish: Publish
) -> None:
    async def play(stage: Stage, store: MetadataStore) -> None:
        prefill = encode_node(record("p", "kv_producer", stage.prefill.url)).decode()
        decode = encode_node(record("d", "kv_consumer", stage.decode.url))
        store.put(node_key("d", 0), decode)
        node = await asyncio.to_thread(publish, etcd.address, node_key("p", 0), prefill)
        await stage.health(prefill_in=1, decode_in=1)
        assert (await stage.ask())[0] == 200
        assert "kv_transfer_params" in stage.decode.bodies[-1]
        node.kill()
        stage.prefill.healthy = False  # nor would the last one with no record be let go
        await stage.health(prefill_in=0, prefill_out=0)
        assert (await stage.ask())[0] == 200
        assert stage.decode.bodies[-1] == ASK
        stage.prefill.healthy = True
        await asyncio.to_thread(publish, etcd.address, node_key("p", 0), prefill)
        await stage.health(prefill_in=1)

    watched(play, stores(etcd.address))


def test_an_etcd_outage_leaves_the_known_servers_in(etcd: EtcdServer, stores: Stores) -> None:
    async def play(stage: Stage, store: MetadataStore) -> None:
        store.put(node_key("p", 0), encode_node(record("p", "kv_producer", stage.prefill.url)))
        store.put(node_key("d", 0), encode_node(record("d", "kv_consumer", stage.decode.url)))
        await stage.health(prefill_in=1, decode_in=1)
        await asyncio.to_thread(etcd.kill)
        assert (await stage.ask())[0] == 200
        assert "kv_transfer_params" in stage.decode.bodies[-1]
        assert (await stage.get("/health"))[0] == 200

    watched(play, stores(etcd.address))
