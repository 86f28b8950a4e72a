"""Which servers there are, and who gets the next request."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from proxy_stage import ASK, PARAMS, Stage, StandIn, record, staged, until, unused_url, watched

from mooncake_connector.cluster import encode_node, node_key
from mooncake_connector.proxy import pool

if TYPE_CHECKING:
    from mooncake_engine.metadata.base import MetadataStore


def test_requests_go_to_the_least_loaded_server() -> None:
    async def play(stage: Stage) -> None:
        other = StandIn(stage.decode.answer)
        other.port = int(spare.rpartition(":")[2])
        await other.start()
        try:
            await stage.health(decode_in=2)
            stage.decode.may_answer.clear()
            asking: list[asyncio.Task[Any]] = []
            while not stage.decode.bodies:
                asking.append(asyncio.create_task(stage.ask()))
                await asyncio.wait(
                    {asyncio.create_task(stage.decode.arrived.wait()), asking[-1]},
                    return_when=asyncio.FIRST_COMPLETED,
                )
            before = len(other.bodies)
            for _ in range(4):
                assert (await stage.ask())[0] == 200
            assert len(other.bodies) == before + 4
            stage.decode.may_answer.set()
            await asyncio.gather(*asking)
        finally:
            await other.stop()

    spare = unused_url()
    staged(play, more_decode=(spare,))


@pytest.fixture
def records_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server leaves with its record."""
    monkeypatch.setattr(pool, "WITHOUT_RECORD_S", 0.0)


@pytest.mark.usefixtures("records_only")
def test_servers_come_and_go_with_their_records() -> None:
    async def play(stage: Stage, store: MetadataStore) -> None:
        await stage.health(prefill_in=0, decode_in=0)
        prefill = record("p", "kv_producer", stage.prefill.url)
        store.put(node_key("p", 0), encode_node(prefill))
        store.put(node_key("d", 0), encode_node(record("d", "kv_consumer", stage.decode.url)))
        store.put("nodes/other/0", b"not a record")
        await stage.health(prefill_in=1, decode_in=1)
        assert (await stage.ask())[:2] == (200, stage.decode.answer)
        assert stage.decode.bodies == [ASK | {"kv_transfer_params": PARAMS}]
        store.delete(node_key("p", 0))
        await stage.health(prefill_in=0, prefill_out=0)
        assert (await stage.get("/health"))[0] == 503
        store.put(node_key("p", 0), encode_node(prefill))
        await stage.health(prefill_in=1)
        assert (await stage.get("/health"))[0] == 200

    watched(play)


def test_a_server_that_left_is_not_probed_any_more() -> None:
    def probes() -> set[str]:
        names = {task.get_name() for task in asyncio.all_tasks()}
        return {name for name in names if name.startswith("probe")}

    async def none_left() -> bool:
        return not probes()

    async def play(stage: Stage, store: MetadataStore) -> None:
        stage.prefill.healthy = False
        store.put(node_key("p", 0), encode_node(record("p", "kv_producer", stage.prefill.url)))
        await stage.health(prefill_out=1)
        assert probes() == {f"probe {stage.prefill.url}"}
        store.delete(node_key("p", 0))
        await stage.health(prefill_out=0)
        await until(none_left)

    watched(play)


class Two:
    """A prefill and a decode server in the store, whose records may go."""

    def __init__(self, stage: Stage, store: MetadataStore) -> None:
        self._store = store
        self._records = {
            node_key("p", 0): encode_node(record("p", "kv_producer", stage.prefill.url)),
            node_key("d", 0): encode_node(record("d", "kv_consumer", stage.decode.url)),
        }
        self.come()

    def come(self) -> None:
        for key, value in self._records.items():
            self._store.put(key, value)

    def go(self) -> None:
        for key in self._records:
            self._store.delete(key)


async def said(caplog: pytest.LogCaptureFixture, what: str, times: int) -> None:
    async def is_said() -> bool:
        return caplog.text.count(what) == times

    await until(is_said)


def test_the_last_servers_are_used_without_records_until_these_come_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As when etcd is so slow that all leases run out at once."""
    caplog.set_level("INFO")

    async def play(stage: Stage, store: MetadataStore) -> None:
        two = Two(stage, store)
        await stage.health(prefill_in=1, decode_in=1)
        for times in (2, 4):
            two.go()
            await said(caplog, "has no record any more, nor has any other", times)
            assert (await stage.ask())[0] == 200
            assert stage.decode.bodies[-1] == ASK | {"kv_transfer_params": PARAMS}
            two.come()
            await said(caplog, "has a record again", times)
        assert " left" not in caplog.text

    watched(play)


@pytest.mark.parametrize("ends", ["its time is over", "a request fails", "its health fails"])
def test_a_last_server_without_a_record_leaves_when(
    ends: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(pool, "LAST_ONE_PROBE_S", 0.01)
    if ends == "its time is over":
        monkeypatch.setattr(pool, "WITHOUT_RECORD_S", 0.1)

    async def play(stage: Stage, store: MetadataStore) -> None:
        two = Two(stage, store)
        await stage.health(prefill_in=1, decode_in=1)
        two.go()
        await said(caplog, "has no record any more, nor has any other", 2)
        if ends == "a request fails":
            stage.prefill.die()
            assert (await stage.ask())[:2] == (200, stage.decode.answer)
            assert stage.decode.bodies == [ASK]
        elif ends == "its health fails":
            stage.prefill.healthy = False
        await stage.health(prefill_in=0, prefill_out=0)
        assert f"{stage.prefill.url} left" in caplog.text

    watched(play)


def test_one_without_a_record_leaves_when_another_comes_in() -> None:
    async def play(stage: Stage, store: MetadataStore) -> None:
        Two(stage, store)
        await stage.health(prefill_in=1, decode_in=1)
        store.delete(node_key("p", 0))
        other = StandIn(stage.prefill.answer)
        await other.start()
        try:
            url = f"http://127.0.0.1:{other.port}"
            store.put(node_key("o", 0), encode_node(record("o", "kv_producer", url)))

            async def only_the_other() -> bool:
                await stage.ask()
                return len(other.bodies) > 0

            await until(only_the_other)
            await stage.health(prefill_in=1, prefill_out=0)
        finally:
            await other.stop()

    watched(play)


def test_both_at_once_names_the_nodes_of_the_record() -> None:
    async def play(stage: Stage, store: MetadataStore) -> None:
        store.put(node_key("p", 0), encode_node(record("p", "kv_producer", stage.prefill.url)))
        store.put(node_key("d", 0), encode_node(record("d", "kv_consumer", stage.decode.url)))
        await stage.health(prefill_in=1, decode_in=1)
        assert (await stage.ask())[0] == 200
        params = stage.decode.bodies[0]["kv_transfer_params"]
        assert params["remote_engine_id"] == "p"
        assert params["remote_endpoints"] == ["p:1"]
        assert params["remote_incarnations"] == ["p-started"]
        assert "X-Data-Parallel-Rank" not in stage.prefill.headers[0]

    watched(play, style="both-at-once")


def test_each_of_two_data_parallel_engines_gets_the_requests_meant_for_it() -> None:
    async def play(stage: Stage, store: MetadataStore) -> None:
        for rank, name in enumerate(("p0", "p1")):
            node = record(name, "kv_producer", stage.prefill.url, rank)
            store.put(node_key(name, 0), encode_node(node))
        store.put(node_key("d", 0), encode_node(record("d", "kv_consumer", stage.decode.url)))
        await stage.health(prefill_in=1, decode_in=1)
        for _ in range(4):
            assert (await stage.ask())[0] == 200
        meant = [body["kv_transfer_params"]["remote_engine_id"] for body in stage.decode.bodies]
        ranks = [headers["X-Data-Parallel-Rank"] for headers in stage.prefill.headers]
        assert meant == [f"p{rank}" for rank in ranks]
        assert set(ranks) == {"0", "1"}

    watched(play, style="both-at-once")
