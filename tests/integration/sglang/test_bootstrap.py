"""The bootstrap server beside SGLang's own classes, over real HTTP and with a real etcd."""

from __future__ import annotations

import json
import socket
import warnings
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import requests
from etcd_stage import EtcdServer, Stores, wait_until
from harness.servers import free_port
from mooncake_engine.config import MetadataConfig
from mooncake_engine.errors import ConfigError
from mooncake_engine.metadata.etcd import EtcdClient
from route_rows import ALL, body, place, query, record, server

from mooncake_connector.bootstrap import BootstrapError
from mooncake_connector.cluster import node_key

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch deprecates what SGLang imports
    from sglang.srt.disaggregation.common import conn
    from sglang.srt.managers import disagg_service
    from sglang.srt.plugins.hook_registry import HookRegistry
    from sglang.srt.runtime_context import get_context

    from mooncake_connector.sglang import register
    from mooncake_connector.sglang.bootstrap import MooncakeKVBootstrapServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

HOST = "127.0.0.1"
LEASE_S = 2
SOON_S = 10.0  # a lease of 2 s, and what a busy machine adds


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture(autouse=True)
def process(port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process is a prefill server's, as far as SGLang's settings go."""
    monkeypatch.setenv("SGLANG_HOST_IP", HOST)
    with get_context().override_server_args(
        host=HOST,
        disaggregation_mode="prefill",
        disaggregation_transfer_backend=register.NAME,
        disaggregation_bootstrap_port=port,
    ):
        yield
    for session in getattr(conn._bootstrap_sessions, "by_addr", {}).values():
        session.close()  # those of the client half of SGLang stay open for its process's life


@pytest.fixture
def bootstrap(port: int) -> Iterator[MooncakeKVBootstrapServer]:
    server = MooncakeKVBootstrapServer(HOST, port)
    yield server
    server.close()


@pytest.fixture
def configure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make etcd the place where ranks publish, for this process."""

    def write(*endpoints: str) -> None:
        file = tmp_path / "mooncake.json"
        metadata = {"backend": "etcd", "endpoints": endpoints, "cluster": "test"}
        file.write_text(json.dumps({"engine": {"metadata": metadata | {"lease_ttl_s": LEASE_S}}}))
        monkeypatch.setenv("MOONCAKE_CONFIG_PATH", str(file))

    return write


def put(port: int, row: dict[str, Any]) -> requests.Response:
    return requests.put(f"http://{HOST}:{port}/route", json=row, timeout=5)


def topology(port: int) -> requests.Response:
    return requests.get(f"http://{HOST}:{port}/route", params=query(ALL), timeout=5)


def rank(port: int, number: int) -> dict[str, Any] | None:
    """What SGLang's decode hears of that tensor-parallel rank."""
    decode = SimpleNamespace(bootstrap_addr=f"{HOST}:{port}")
    ask = conn.CommonKVReceiver._get_bootstrap_info_from_server
    found: dict[str, Any] | None = ask(decode, 0, 0, number, 0)
    return found


def key(port: int, number: int = 0) -> str:
    return node_key(f"{HOST}:{port}", number)


@pytest.fixture
def sglangs() -> Iterator[int]:
    """Port of the server that SGLang's own backends use."""
    port = free_port()
    server = conn.CommonKVBootstrapServer(HOST, port)

    def listens() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((HOST, port)) == 0

    wait_until(listens, 10, "SGLang's own bootstrap server listens")
    yield port
    server.close()


@pytest.mark.parametrize(
    "rows",
    [
        server(1),
        server(2, kv_layout="paged", dsv41_spec_layout={"block": 4}),
        server(1, load_balance_method="follow_bootstrap_room", kv_cache_dtype=None),
        [body(attn_dp_size=2, attn_dp_rank=dp) | {"rank": dp} for dp in range(2)],
        [body(system_dp_size=2, system_dp_rank=dp) | {"rank": dp} for dp in range(2)],
        [body(pp_size=2, pp_rank=pp) | {"rank": pp} for pp in range(2)],
    ],
    ids=["one rank", "layouts", "by room", "dp attention", "dp", "pp"],
)
def test_the_topology_is_what_sglangs_own_server_answers(
    rows: list[dict[str, Any]], sglangs: int, bootstrap: MooncakeKVBootstrapServer
) -> None:
    for row in rows:
        assert topology(sglangs).status_code == topology(bootstrap.port).status_code == 503
        assert put(sglangs, row).status_code == put(bootstrap.port, row).status_code == 200
    ours = topology(bootstrap.port)
    assert ours.json() == topology(sglangs).json()
    assert conn.PrefillServerInfo(**ours.json()).page_size == 64


def test_sglangs_decode_finds_each_rank_and_what_we_say_of_it(
    bootstrap: MooncakeKVBootstrapServer,
) -> None:
    rows = server(2)
    put(bootstrap.port, rows[0])
    assert rank(bootstrap.port, 0) is None
    put(bootstrap.port, rows[1])
    assert rank(bootstrap.port, 1) == place(rows[1]) | {"pp_rank": 0}
    assert rank(bootstrap.port, 2) is None
    again = rows[1] | {"rank_port": 9999, "incarnation": "later"}
    assert put(bootstrap.port, again).status_code == 200
    assert rank(bootstrap.port, 1) == place(again) | {"pp_rank": 0}


def test_sglangs_decode_finds_the_data_parallel_rank_of_a_room(
    bootstrap: MooncakeKVBootstrapServer,
) -> None:
    address = f"{HOST}:{bootstrap.port}"
    prefill = SimpleNamespace(
        bootstrap_server_url=address,
        bootstrap_room=1 << 62,
        kv_mgr=SimpleNamespace(attn_dp_rank=3),
    )
    conn.CommonKVSender._register_prefill_dp_rank(prefill)
    asked = conn.CommonKVReceiver.query_prefill_dp_ranks(address, [7, 1 << 62])
    assert asked == {str(1 << 62): 3}


def test_sglang_starts_it_also_when_its_rust_server_serves_the_api(port: int) -> None:
    register.register()
    HookRegistry.apply_hooks()
    started = disagg_service.start_disagg_service()
    try:
        assert isinstance(started, MooncakeKVBootstrapServer)
        assert requests.get(f"http://{HOST}:{port}/health", timeout=5).text == "OK"
    finally:
        started.close()
    assert not disagg_service.rust_server_serves_kv_bootstrap(register.NAME)


@pytest.mark.parametrize("host", [HOST, "localhost", "0.0.0.0"])
def test_a_taken_port_is_named_with_its_flag_and_nothing_stays_open(host: str) -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BootstrapError) as refusal:
            MooncakeKVBootstrapServer(host, port)
    assert f"{host}:{port}: the port is taken" in str(refusal.value)
    assert "--disaggregation-bootstrap-port" in str(refusal.value)


def test_a_host_that_is_not_of_this_machine_is_named() -> None:
    with pytest.raises(BootstrapError, match=r"cannot listen on 192\.0\.2\.1:0: .*assign"):
        MooncakeKVBootstrapServer("192.0.2.1", 0)


def test_a_closed_server_gives_its_port_back_and_can_be_closed_again(port: int) -> None:
    for _ in range(2):
        server = MooncakeKVBootstrapServer(HOST, port)
        assert requests.get(f"http://{HOST}:{port}/health", timeout=5).status_code == 200
        server.close()
        server.close()
        with pytest.raises(requests.ConnectionError):
            requests.get(f"http://{HOST}:{port}/health", timeout=5)


def test_a_client_that_holds_its_connection_does_not_hold_up_the_end(port: int) -> None:
    server = MooncakeKVBootstrapServer(HOST, port)
    with requests.Session() as session, socket.create_connection((HOST, port)) as silent:
        assert session.get(f"http://{HOST}:{port}/health", timeout=5).status_code == 200
        silent.sendall(b"PUT /route HTTP/1.1\r\nHost: x\r\nContent-Length: 999\r\n\r\n{")
        server.close()
        silent.settimeout(5)
        while silent.recv(1024):
            pass


def test_settings_that_cannot_be_used_leave_nothing_open(
    port: int, configure: Callable[..., None]
) -> None:
    configure()
    with pytest.raises(ConfigError, match="endpoints"):
        MooncakeKVBootstrapServer(HOST, port)
    with socket.create_server((HOST, port)):
        pass


def test_a_row_in_etcd_appears_and_goes_with_its_lease(
    port: int, etcd: EtcdServer, configure: Callable[..., None]
) -> None:
    configure(etcd.address)
    first, second = server(2)
    client = EtcdClient(MetadataConfig(backend="etcd", endpoints=(etcd.address,)))
    root = "mooncake/test/"
    started = MooncakeKVBootstrapServer(HOST, port)
    try:
        # Nobody renews these leases: these ranks died when they had published.
        client.put(root + key(port, 0), record(first), client.grant(60))
        client.put(root + key(port, 1), record(second), client.grant(LEASE_S))
        wait_until(lambda: topology(port).ok, SOON_S, "both ranks are known")
        assert rank(port, 1) == place(second) | {"pp_rank": 0}
        wait_until(lambda: not topology(port).ok, SOON_S, "the lease of one has ended")
        assert topology(port).text == "1 of 2 prefill ranks have registered"
    finally:
        started.close()
        client.close()


def test_rows_of_another_server_are_not_its_own(
    port: int, etcd: EtcdServer, stores: Stores, configure: Callable[..., None]
) -> None:
    configure(etcd.address)
    store = stores(etcd.address)
    store.put(node_key(f"{HOST}:{port}0", 0), record(body(rank_port=1)))
    store.put(key(port), record(body(rank_port=2)))
    started = MooncakeKVBootstrapServer(HOST, port)
    try:
        wait_until(lambda: topology(port).ok, SOON_S, "its rank is known")
        assert (rank(port, 0) or {})["rank_port"] == 2
    finally:
        started.close()


def test_ranks_are_known_again_to_a_server_that_restarts_alone(
    port: int, etcd: EtcdServer, stores: Stores, configure: Callable[..., None]
) -> None:
    configure(etcd.address)
    stores(etcd.address).put(key(port), record(body()))
    for _ in range(2):
        started = MooncakeKVBootstrapServer(HOST, port)
        try:
            wait_until(lambda: topology(port).ok, SOON_S, "its rank is known")
        finally:
            started.close()


def test_it_serves_what_it_knows_while_etcd_is_away(
    port: int, etcd: EtcdServer, stores: Stores, configure: Callable[..., None]
) -> None:
    configure(etcd.address)
    store = stores(etcd.address)
    first, second = server(2)
    store.put(key(port, 0), record(first))
    store.put(key(port, 1), record(second))
    started = MooncakeKVBootstrapServer(HOST, port)
    try:
        wait_until(lambda: topology(port).ok, SOON_S, "both ranks are known")
        etcd.kill()
        moved = second | {"rank_port": 7777, "incarnation": "later"}
        store.put(key(port, 1), record(moved))
        assert rank(port, 1) == place(second) | {"pp_rank": 0}
        etcd.start()
        expected = place(moved) | {"pp_rank": 0}
        wait_until(lambda: rank(port, 1) == expected, 2 * SOON_S, "the change is known")
        assert topology(port).ok
    finally:
        started.close()


def test_it_starts_without_etcd_and_says_what_is_missing(
    port: int, etcd: EtcdServer, stores: Stores, configure: Callable[..., None]
) -> None:
    configure(etcd.address)
    etcd.kill()
    started = MooncakeKVBootstrapServer(HOST, port)
    try:
        assert topology(port).status_code == 503
        assert requests.get(f"http://{HOST}:{port}/health", timeout=5).ok
        etcd.start()
        stores(etcd.address).put(key(port), record(body()))
        wait_until(lambda: topology(port).ok, 2 * SOON_S, "the rank is known")
    finally:
        started.close()
