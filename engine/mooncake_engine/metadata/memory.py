"""Metadata shared by all stores of one cluster name in one process; for tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from mooncake_engine.errors import MetadataError
from mooncake_engine.metadata.base import MetadataStore, OnChange, Watch
from mooncake_engine.metadata.local import LocalTable

if TYPE_CHECKING:
    from mooncake_engine.config import MetadataConfig


class MemoryStore(MetadataStore):
    """Nothing here can be away, so nothing but use after close raises."""

    _clusters: ClassVar[dict[str, LocalTable]] = {}

    def __init__(self, config: MetadataConfig) -> None:
        self._table = self._clusters.setdefault(config.cluster, LocalTable())
        self._watches: list[Watch] = []
        self._closed = False

    @override
    def put(self, key: str, value: bytes) -> None:
        """See `MetadataStore.put`."""
        self._check_open()
        self._table.put(key, value, self)

    @override
    def delete(self, key: str) -> None:
        """See `MetadataStore.delete`."""
        self._check_open()
        self._table.delete(key, self)

    @override
    def get(self, key: str) -> bytes | None:
        """See `MetadataStore.get`."""
        self._check_open()
        return self._table.get(key)

    @override
    def list(self, prefix: str) -> dict[str, bytes]:
        """See `MetadataStore.list`."""
        self._check_open()
        return self._table.list(prefix)

    @override
    def watch(self, prefix: str, on_change: OnChange) -> Watch:
        """See `MetadataStore.watch`."""
        self._check_open()
        watch = self._table.watch(prefix, on_change)
        self._watches.append(watch)
        return watch

    @override
    def close(self) -> None:
        """See `MetadataStore.close`."""
        if self._closed:
            return
        self._closed = True
        for watch in self._watches:
            watch.close()
        self._table.delete_all(self)

    def _check_open(self) -> None:
        if self._closed:
            raise MetadataError("the metadata store is closed")
