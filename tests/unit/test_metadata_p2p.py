from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING

import pytest
from etcd_stage import Seen
from harness.servers import free_port
from mooncake_engine.config import MetadataConfig
from mooncake_engine.errors import MetadataError
from mooncake_engine.metadata.p2p import P2pStore

if TYPE_CHECKING:
    from collections.abc import Iterator

ANY_PORT = MetadataConfig(backend="p2p", p2p_min_port=0, p2p_max_port=0, timeout_s=2.0)


@pytest.fixture
def one() -> Iterator[P2pStore]:
    store = P2pStore(ANY_PORT, "127.0.0.1")
    yield store
    store.close()


@pytest.fixture
def other() -> Iterator[P2pStore]:
    store = P2pStore(ANY_PORT, "127.0.0.1")
    yield store
    store.close()


def test_a_segment_is_asked_at_the_address_that_is_its_name(one: P2pStore, other: P2pStore) -> None:
    record = bytes(range(256)) * 5000  # more than one receive
    key = f"segments/{one.address}"
    one.put(key, record)
    assert one.get(key) == record
    assert other.get(key) == record
    one.delete(key)
    assert other.get(key) is None


def test_it_works_over_ipv6() -> None:
    one, other = P2pStore(ANY_PORT, "::1"), P2pStore(ANY_PORT, "::1")
    assert one.address.startswith("[::1]:")
    one.put(f"segments/{one.address}", b"1")
    assert other.get(f"segments/{one.address}") == b"1"
    one.close()
    other.close()


def test_list_and_watch_see_own_keys_only(one: P2pStore, other: P2pStore) -> None:
    seen = Seen()
    other.put("nodes/x", b"0")
    one.put("nodes/a", b"1")
    one.watch("nodes/", seen)
    one.put("nodes/b", b"2")
    seen.until({"nodes/a": b"1", "nodes/b": b"2"})
    assert one.list("nodes/") == {"nodes/a": b"1", "nodes/b": b"2"}
    assert one.get("nodes/x") is None


def test_nobody_at_the_address_is_named(one: P2pStore) -> None:
    name = f"127.0.0.1:{free_port()}"
    with pytest.raises(MetadataError, match=rf"cannot ask {name} .* refused; check that the peer"):
        one.get(f"segments/{name}")


@pytest.mark.parametrize("name", ["decode-0", "host:", ":80", "host:70000", "host:-1"])
def test_a_name_that_is_no_address_is_refused(one: P2pStore, name: str) -> None:
    with pytest.raises(MetadataError, match=rf"named host:port, got '{name}'"):
        one.get(f"segments/{name}")


def test_a_silent_peer_costs_no_more_than_the_timeout(one: P2pStore) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        with pytest.raises(MetadataError, match="timed out"):
            one.get(f"segments/127.0.0.1:{silent.getsockname()[1]}")
    assert time.monotonic() - start < 3


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "does not speak our protocol"),
        (struct.pack("!4sI", b"MCP1", 1 << 31), "announced 2147483648 bytes"),
        (struct.pack("!4sI", b"MCP1", 10) + b"half", "hung up after 4 of 10 bytes"),
        (b"", "hung up after 0 of 8 bytes"),
    ],
)
def test_a_peer_that_answers_nonsense_is_refused(one: P2pStore, answer: bytes, reason: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(MetadataError, match=reason):
            one.get(f"segments/127.0.0.1:{listener.getsockname()[1]}")
        thread.join()


@pytest.mark.parametrize(
    "garbage",
    [b"GET / HTTP/1.1\r\n\r\n", struct.pack("!4sI", b"MCP1", 1 << 30), b"MC", b""],
)
def test_a_stranger_is_closed_and_harms_nobody(
    one: P2pStore, other: P2pStore, garbage: bytes
) -> None:
    one.put(f"segments/{one.address}", b"1")
    host, port = one.address.split(":")
    with socket.create_connection((host, int(port)), 5) as stranger:
        stranger.sendall(garbage)
        assert other.get(f"segments/{one.address}") == b"1"  # while the stranger is connected
        with contextlib.suppress(OSError):  # reset already: it was closed with bytes unread
            stranger.shutdown(socket.SHUT_WR)
        assert read_to_end(stranger) == b""


def test_close_ends_a_connection_that_says_nothing(other: P2pStore) -> None:
    store = P2pStore(ANY_PORT, "127.0.0.1")
    host, port = store.address.split(":")
    with socket.create_connection((host, int(port)), 5) as stranger:
        store.put(f"segments/{store.address}", b"1")
        assert other.get(f"segments/{store.address}") == b"1"  # so the stranger was accepted
        start = time.monotonic()
        store.close()
        store.close()
        assert time.monotonic() - start < 5
        assert read_to_end(stranger) == b""
    with pytest.raises(MetadataError, match="closed"):
        store.get("a")


def test_the_first_free_port_of_the_range_is_taken_and_a_full_range_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        full = MetadataConfig(p2p_min_port=port, p2p_max_port=port)
        with pytest.raises(MetadataError, match=rf"ports {port} to {port}: .*in use; set"):
            P2pStore(full, "127.0.0.1")
        store = P2pStore(MetadataConfig(p2p_min_port=port, p2p_max_port=65535), "127.0.0.1")
        assert int(store.address.split(":")[1]) > port
        store.close()


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(MetadataError, match=r"'192\.0\.2\.1'.*an address of this machine"):
        P2pStore(ANY_PORT, "192.0.2.1")


def test_a_record_that_no_peer_would_accept_is_refused_when_published(one: P2pStore) -> None:
    with pytest.raises(MetadataError, match="at most 16777216 can be published"):
        one.put("segments/big", bytes((16 << 20) + 1))


def read_to_end(connection: socket.socket) -> bytes:
    try:
        return connection.recv(1)
    except ConnectionResetError:  # closed with our bytes unread: closed all the same
        return b""
