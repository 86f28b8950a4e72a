from __future__ import annotations

import shutil
import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest
from etcd_stage import Relay
from mooncake_engine.config import MetadataConfig
from mooncake_engine.errors import MetadataError
from mooncake_engine.metadata.etcd import EtcdClient
from mooncake_engine.metadata.etcd_types import RevisionGone

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    from etcd_stage import EtcdServer, Seen, Stores

    Publish = Callable[[str, str, str], subprocess.Popen[str]]


def test_with_the_server_away_reading_fails_within_the_timeout(
    etcd: EtcdServer, stores: Stores
) -> None:
    store = stores(etcd.address, timeout_s=1.0)
    store.put("a", b"1")
    etcd.kill()
    for read in (lambda: store.get("a"), lambda: store.list("")):
        start = time.monotonic()
        with pytest.raises(MetadataError, match=rf"no etcd answered within 1 s.*{etcd.address}"):
            read()
        assert time.monotonic() - start < 5


def test_the_first_put_without_a_server_says_which_endpoint_is_dead(
    cold_etcd: EtcdServer, stores: Stores
) -> None:
    store = stores(cold_etcd.address, timeout_s=0.5)
    with pytest.raises(MetadataError, match=rf"{cold_etcd.address}.*refused.*endpoints"):
        store.put("a", b"1")


def test_what_is_put_and_deleted_during_an_outage_happens_after_it(
    etcd: EtcdServer, stores: Stores, seen: Seen
) -> None:
    store = stores(etcd.address)
    store.put("a", b"1")
    store.put("b", b"2")
    etcd.kill()
    store.put("c", b"3")
    start = time.monotonic()
    store.put("a", b"later")
    store.delete("b")
    assert time.monotonic() - start < 2.5  # the outage is known by now: nobody waits for it
    etcd.start()
    stores(etcd.address).watch("", seen)
    seen.until({"a": b"later", "c": b"3"})


def test_an_empty_restart_brings_all_keys_back_and_nobody_is_reported_gone(
    etcd: EtcdServer, stores: Stores, seen: Seen
) -> None:
    first, second = stores(etcd.address), stores(etcd.address)
    first.put("nodes/a", b"1")
    second.put("nodes/b", b"2")
    stores(etcd.address, lease_ttl_s=10).watch("nodes/", seen)
    seen.until({"nodes/a": b"1", "nodes/b": b"2"})
    etcd.restart_empty()
    second.put("nodes/c", b"3")  # so the watch has something to hear of after its reconnect
    seen.until({"nodes/a": b"1", "nodes/b": b"2", "nodes/c": b"3"})
    reader = stores(etcd.address)
    deadline = time.monotonic() + 10
    pause = threading.Event()
    while len(reader.list("nodes/")) < 3 and time.monotonic() < deadline:
        pause.wait(0.05)
    assert reader.list("nodes/") == seen.now
    assert seen.gone == []
    assert seen.events.count(("nodes/a", b"1")) == 1  # the same record is no change


def test_after_an_empty_restart_a_dead_publisher_is_gone_after_one_lease(
    etcd: EtcdServer, stores: Stores, seen: Seen, publish: Publish
) -> None:
    process = publish(etcd.address, "nodes/dead", "1")
    alive = stores(etcd.address)
    alive.put("nodes/alive", b"2")
    stores(etcd.address, lease_ttl_s=3).watch("nodes/", seen)
    seen.until({"nodes/dead": b"1", "nodes/alive": b"2"})
    etcd.kill()
    process.send_signal(signal.SIGKILL)
    shutil.rmtree(etcd.data)
    etcd.start()
    back = time.monotonic()
    seen.until({"nodes/alive": b"2"}, within=10)
    assert time.monotonic() - back > 2  # the lease's time was granted, from the reconnect on
    assert seen.gone == ["nodes/dead"]


def test_peers_stay_known_for_as_long_as_the_server_is_away(
    etcd: EtcdServer, stores: Stores, seen: Seen
) -> None:
    publisher = stores(etcd.address)
    publisher.put("nodes/a", b"1")
    stores(etcd.address, lease_ttl_s=2, timeout_s=0.5).watch("nodes/", seen)
    seen.until({"nodes/a": b"1"})
    etcd.kill()
    seen.stays(4)  # twice the lease
    etcd.start()
    publisher.put("nodes/b", b"2")
    seen.until({"nodes/a": b"1", "nodes/b": b"2"})
    assert seen.gone == []


def test_a_key_deleted_behind_a_cut_line_is_gone_at_once_when_the_server_kept_its_data(
    etcd: EtcdServer, stores: Stores, seen: Seen
) -> None:
    publisher = stores(etcd.address)
    publisher.put("nodes/a", b"1")
    publisher.put("nodes/b", b"2")
    with Relay(etcd.port) as relay:
        watcher = stores(relay.address, lease_ttl_s=3600)
        watcher.watch("nodes/", seen)
        seen.until({"nodes/a": b"1", "nodes/b": b"2"})
        relay.cut()
        publisher.delete("nodes/a")
        publisher.put("nodes/b", b"new")
        relay.mend()
        seen.until({"nodes/b": b"new"}, within=10)  # not after the lease of an hour
        watcher.close()


def test_a_second_outage_starts_the_grace_of_a_missing_key_anew(
    etcd: EtcdServer, stores: Stores, seen: Seen
) -> None:
    bystander = stores(etcd.address)
    with Relay(etcd.port) as relay:
        publisher = stores(relay.address)
        publisher.put("nodes/a", b"1")
        stores(etcd.address, lease_ttl_s=2, timeout_s=0.5).watch("nodes/", seen)
        seen.until({"nodes/a": b"1"})
        relay.cut()
        etcd.restart_empty()
        bystander.put("nodes/b", b"2")
        seen.until({"nodes/a": b"1", "nodes/b": b"2"})  # a is missed from now on
        etcd.kill()
        seen.stays(3)  # longer than its grace
        etcd.start()
        bystander.put("nodes/b", b"3")
        seen.until({"nodes/a": b"1", "nodes/b": b"3"})
        relay.mend()
        bystander.put("nodes/c", b"4")
        seen.until({"nodes/a": b"1", "nodes/b": b"3", "nodes/c": b"4"})
        seen.stays(3)
        assert seen.gone == []
        publisher.close()


def test_a_server_that_is_behind_the_watched_revision_ends_the_watch(etcd: EtcdServer) -> None:
    config = MetadataConfig(backend="etcd", endpoints=(etcd.address,))
    client = EtcdClient(config)
    stream = client.watch("nodes/", 1000, 10.0)
    try:
        with pytest.raises(RevisionGone, match="lost its data"):
            next(iter(stream))
    finally:
        stream.close()
        client.close()


def test_close_is_quick_while_the_server_is_away(
    etcd: EtcdServer, stores: Stores, seen: Seen
) -> None:
    store = stores(etcd.address, timeout_s=20.0)
    store.put("a", b"1")
    store.watch("", seen)
    seen.until({"a": b"1"})
    etcd.kill()
    start = time.monotonic()
    store.close()
    assert time.monotonic() - start < 3
