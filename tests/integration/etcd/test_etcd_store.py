from __future__ import annotations

import signal
import socket
import threading
import time
from typing import TYPE_CHECKING

import pytest
from harness.servers import free_port
from mooncake_engine.errors import ConfigError, MetadataError

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    from etcd_stage import EtcdServer, Seen, Stores

    Publish = Callable[[str, str, str], subprocess.Popen[str]]


def test_what_one_store_puts_another_gets_and_lists(etcd: EtcdServer, stores: Stores) -> None:
    one, other = stores(etcd.address), stores(etcd.address)
    one.put("segments/a", b"1")
    one.put("segments/b", b"2")
    one.put("nodes/x/0", b"3")
    assert other.get("segments/a") == b"1"
    assert other.get("segments/missing") is None
    assert other.list("segments/") == {"segments/a": b"1", "segments/b": b"2"}
    one.put("segments/a", b"new")
    assert other.get("segments/a") == b"new"
    one.delete("segments/a")
    one.delete("segments/never-put")
    assert other.list("") == {"segments/b": b"2", "nodes/x/0": b"3"}


def test_clusters_do_not_see_each_other(etcd: EtcdServer, stores: Stores) -> None:
    stores(etcd.address, cluster="one").put("segments/a", b"1")
    assert stores(etcd.address, cluster="two").list("") == {}


def test_a_watch_reports_what_is_there_and_then_each_change(
    etcd: EtcdServer, stores: Stores, seen: Seen
) -> None:
    one, other = stores(etcd.address), stores(etcd.address)
    one.put("nodes/a", b"1")
    one.put("elsewhere", b"0")
    watch = other.watch("nodes/", seen)
    seen.until({"nodes/a": b"1"})
    one.put("nodes/b", b"2")
    seen.until({"nodes/a": b"1", "nodes/b": b"2"})
    one.put("nodes/a", b"changed")
    one.delete("nodes/b")
    seen.until({"nodes/a": b"changed"})
    assert seen.gone == ["nodes/b"]
    watch.close()
    watch.close()
    one.put("nodes/c", b"3")
    assert other.get("nodes/c") == b"3"
    assert seen.now == {"nodes/a": b"changed"}


def test_a_callback_that_raises_does_not_end_the_watch(
    etcd: EtcdServer, stores: Stores, seen: Seen, caplog: pytest.LogCaptureFixture
) -> None:
    def fails_first(key: str, value: bytes | None) -> None:
        if not seen.events:
            seen(key, value)
            raise RuntimeError("the caller's mistake")
        seen(key, value)

    store = stores(etcd.address)
    store.watch("", fails_first)
    store.put("a", b"1")
    seen.until({"a": b"1"})
    store.put("b", b"2")
    seen.until({"a": b"1", "b": b"2"})
    assert "the callback for" in caplog.text


def test_close_takes_back_every_key_at_once(etcd: EtcdServer, stores: Stores, seen: Seen) -> None:
    one, other = stores(etcd.address, lease_ttl_s=60), stores(etcd.address)
    one.put("a", b"1")
    one.put("b", b"2")
    other.watch("", seen)
    seen.until({"a": b"1", "b": b"2"})
    one.close()
    one.close()
    seen.until({}, within=2)
    with pytest.raises(MetadataError, match="closed"):
        one.put("a", b"1")


def test_close_leaves_no_thread_behind(etcd: EtcdServer, stores: Stores, seen: Seen) -> None:
    before = set(threading.enumerate())
    store = stores(etcd.address)
    store.put("a", b"1")
    store.watch("", seen)
    store.watch("a", lambda _key, _value: None)
    seen.until({"a": b"1"})
    assert set(threading.enumerate()) > before
    store.close()
    assert set(threading.enumerate()) == before


def test_deleting_a_key_spares_the_successor_that_wrote_it_since(
    etcd: EtcdServer, stores: Stores
) -> None:
    old, new = stores(etcd.address), stores(etcd.address)
    old.put("nodes/x", b"old")
    new.put("nodes/x", b"new")
    old.delete("nodes/x")
    old.close()
    assert new.get("nodes/x") == b"new"


def test_a_lease_is_renewed_far_beyond_its_time(
    etcd: EtcdServer, stores: Stores, seen: Seen
) -> None:
    store = stores(etcd.address, lease_ttl_s=2)
    store.put("a", b"1")
    stores(etcd.address).watch("", seen)
    seen.until({"a": b"1"})
    seen.stays(5)


def test_the_keys_of_a_killed_process_disappear_within_its_lease(
    etcd: EtcdServer, stores: Stores, seen: Seen, publish: Publish
) -> None:
    process = publish(etcd.address, "nodes/doomed", "1")
    stores(etcd.address).watch("nodes/", seen)
    seen.until({"nodes/doomed": b"1"})
    process.send_signal(signal.SIGKILL)
    seen.until({}, within=6)  # the lease of 2 s, and etcd looks once a second


def test_a_dead_endpoint_is_passed_over(etcd: EtcdServer, stores: Stores) -> None:
    dead = f"127.0.0.1:{free_port()}"
    store = stores(dead, etcd.address)
    start = time.monotonic()
    store.put("a", b"1")
    assert store.get("a") == b"1"
    assert time.monotonic() - start < 2


def test_an_endpoint_that_accepts_and_says_nothing_is_passed_over(
    etcd: EtcdServer, stores: Stores
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        store = stores(f"127.0.0.1:{silent.getsockname()[1]}", etcd.address)
        store.put("a", b"1")
        start = time.monotonic()
        assert store.get("a") == b"1"  # the one that answered is asked first from now on
        assert time.monotonic() - start < 1.5


def test_a_store_without_endpoints_is_refused(stores: Stores) -> None:
    with pytest.raises(ConfigError, match=r"endpoints is empty; name at least one"):
        stores()


def test_an_endpoint_that_is_no_address_is_refused(stores: Stores) -> None:
    with pytest.raises(ConfigError, match=r"'http://h/path' is not of the form \"host:2379\""):
        stores("http://h/path")
