"""Our record in the metadata store, and those of peers."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

import msgspec

from mooncake_engine.errors import ConfigError, MetadataError, UnknownSegment
from mooncake_engine.hosts import own_address, random_name
from mooncake_engine.metadata import open_store
from mooncake_engine.metadata.p2p import P2pStore
from mooncake_engine.types import SegmentRecord

if TYPE_CHECKING:
    from collections.abc import Callable

    from mooncake_engine.config import EngineConfig
    from mooncake_engine.metadata.base import MetadataStore


class Directory:
    """One engine's view of the store. Safe to call from any thread; every call may block."""

    def __init__(self, config: EngineConfig, name: str, store: MetadataStore | None) -> None:
        """Args: store: the caller's, who closes it; None: open the one that `config` describes.

        Raises:
            ConfigError: A name that p2p cannot give.
            MetadataError: The store cannot be opened.
        """
        self._owned = store is None
        self.store = store or open_store(config.metadata, own_address(config))
        self._lock = threading.Lock()  # records reach the store in the order of their making
        try:
            self.name = self._choose(name)
        except BaseException:
            self.close()
            raise

    def _choose(self, name: str) -> str:
        if not isinstance(self.store, P2pStore):
            return name or random_name()
        if name and name != self.store.address:
            raise ConfigError(
                f"segment name {name!r}: without a metadata server peers find us by our address "
                f"{self.store.address} only; leave the name empty, or use metadata backend etcd"
            )
        return self.store.address

    def publish(self, make_record: Callable[[], SegmentRecord]) -> None:
        """Publish what `make_record` returns now. Raises `MetadataError`."""
        with self._lock:
            self.store.put(f"segments/{self.name}", msgspec.msgpack.encode(make_record()))

    def look_up(self, name: str) -> SegmentRecord:
        """A peer's record.

        Raises:
            UnknownSegment: The store has nothing of that name.
            MetadataError: The store cannot be reached, or holds something unreadable.
        """
        value = self.store.get(f"segments/{name}")
        if value is None:
            raise UnknownSegment(
                f"no segment is called {name!r}; check the name, that its engine runs, and that "
                "both use the same metadata store and cluster"
            )
        try:
            return msgspec.msgpack.decode(value, type=SegmentRecord)
        except msgspec.DecodeError as error:
            raise MetadataError(
                f"the record of segment {name!r} cannot be read: {error}; "
                "run the same release on both sides"
            ) from error

    def close(self) -> None:
        """Withdraw our record; close the store if it is ours. Idempotent."""
        if self._owned:
            self.store.close()  # takes back all its keys
            return
        with contextlib.suppress(MetadataError):  # away or closed: the lease takes the record back
            self.store.delete(f"segments/{self.name}")
