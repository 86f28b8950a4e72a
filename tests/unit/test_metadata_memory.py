from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

import pytest
from etcd_stage import Seen
from mooncake_engine.config import MetadataConfig
from mooncake_engine.errors import MetadataError
from mooncake_engine.metadata import open_store

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mooncake_engine.metadata.base import MetadataStore


@pytest.fixture
def pair() -> Iterator[tuple[MetadataStore, MetadataStore]]:
    """Two stores of one cluster that no other test uses."""
    config = MetadataConfig(backend="memory", cluster=secrets.token_hex(8))
    one, other = open_store(config, ""), open_store(config, "")
    yield one, other
    one.close()
    other.close()


def test_stores_of_one_cluster_share_keys(pair: tuple[MetadataStore, MetadataStore]) -> None:
    one, other = pair
    one.put("segments/a", b"1")
    other.put("nodes/b", b"2")
    assert other.get("segments/a") == b"1"
    assert one.get("nodes/b") == b"2"
    assert one.list("segments/") == {"segments/a": b"1"}
    assert one.get("missing") is None


def test_clusters_are_apart(pair: tuple[MetadataStore, MetadataStore]) -> None:
    pair[0].put("a", b"1")
    stranger = open_store(MetadataConfig(backend="memory", cluster=secrets.token_hex(8)), "")
    assert stranger.list("") == {}
    stranger.close()


def test_a_watch_reports_what_is_there_then_changes_until_closed(
    pair: tuple[MetadataStore, MetadataStore],
) -> None:
    one, other = pair
    seen = Seen()
    one.put("nodes/a", b"1")
    one.put("segments/x", b"0")
    watch = other.watch("nodes/", seen)
    one.put("nodes/b", b"2")
    seen.until({"nodes/a": b"1", "nodes/b": b"2"})
    one.delete("nodes/a")
    seen.until({"nodes/b": b"2"})
    watch.close()
    watch.close()
    one.put("nodes/c", b"3")
    assert seen.now == {"nodes/b": b"2"}


def test_close_takes_back_own_keys_only(pair: tuple[MetadataStore, MetadataStore]) -> None:
    one, other = pair
    one.put("a", b"1")
    one.put("taken-over", b"1")
    other.put("taken-over", b"2")
    one.delete("taken-over")
    one.close()
    one.close()
    assert other.list("") == {"taken-over": b"2"}
    with pytest.raises(MetadataError, match="closed"):
        one.put("a", b"1")


def test_a_callback_may_close_its_own_watch(pair: tuple[MetadataStore, MetadataStore]) -> None:
    one, other = pair
    seen = Seen()

    def once(key: str, value: bytes | None) -> None:
        seen(key, value)
        watch.close()

    watch = other.watch("", once)
    one.put("a", b"1")
    one.put("b", b"2")
    seen.until({"a": b"1"})
    other.close()
    assert seen.events == [("a", b"1")]
