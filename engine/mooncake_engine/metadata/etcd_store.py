"""Metadata in etcd: leased keys that outlive a restart of the server, watches that do too."""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import TYPE_CHECKING

from typing_extensions import override

from mooncake_engine.errors import MetadataError
from mooncake_engine.metadata.base import MetadataStore, OnChange, Watch
from mooncake_engine.metadata.etcd import EtcdClient
from mooncake_engine.metadata.etcd_types import EtcdAway, LeaseLost
from mooncake_engine.metadata.etcd_watch import EtcdWatch

if TYPE_CHECKING:
    from mooncake_engine.config import MetadataConfig

log = logging.getLogger(__name__)

RETRY_S = 0.5  # while the server is away; each try itself waits up to timeout_s


class EtcdStore(MetadataStore):
    """One lease per store. A thread renews it and brings back what the server lost.

    Every call is bounded by `config.timeout_s`. While the server is away `put` and `delete` only
    note what to do; `get` and `list` raise.
    """

    def __init__(self, config: MetadataConfig) -> None:
        """Connects nothing yet. Raises `ConfigError` for endpoints or PEM files of no use."""
        self._config = config
        self._root = f"mooncake/{config.cluster}/"
        self._client = EtcdClient(config)
        self._writing = threading.Lock()  # guards all below and orders our writes
        self._own: dict[str, bytes] = {}
        self._pending: set[str] = set()  # keys of _own to write, or keys to delete
        self._lease = 0
        self._away = False
        self._watches: list[EtcdWatch] = []
        self._keeper: threading.Thread | None = None
        self._wake = threading.Event()
        self._closed = False

    @override
    def put(self, key: str, value: bytes) -> None:
        """See `MetadataStore.put`."""
        with self._writing:
            self._check_open()
            before = self._own.get(key)
            self._own[key] = value
            self._pending.add(key)
            if self._away:
                return
            try:
                self._flush()
            except MetadataError as exc:
                if self._keeper is not None and isinstance(exc, EtcdAway):
                    self._note_away(exc)
                    self._wake.set()
                    return
                self._pending.discard(key)
                if before is None:
                    del self._own[key]
                else:
                    self._own[key] = before
                raise
            if self._keeper is None:
                self._keeper = threading.Thread(
                    target=self._keep, name=f"etcd-lease {self._root}", daemon=True
                )
                self._keeper.start()

    @override
    def delete(self, key: str) -> None:
        """See `MetadataStore.delete`."""
        with self._writing:
            self._check_open()
            if self._own.pop(key, None) is None:
                return
            self._pending.add(key)
            if self._away:
                return
            try:
                self._flush()
            except EtcdAway as exc:
                self._note_away(exc)
                self._wake.set()

    @override
    def get(self, key: str) -> bytes | None:
        """See `MetadataStore.get`."""
        self._check_open()
        return self._client.get(self._root + key)

    @override
    def list(self, prefix: str) -> dict[str, bytes]:
        """See `MetadataStore.list`."""
        self._check_open()
        _, found = self._client.range(self._root + prefix)
        return {key.removeprefix(self._root): entry.value for key, entry in found.items()}

    @override
    def watch(self, prefix: str, on_change: OnChange) -> Watch:
        """See `MetadataStore.watch`. Returns at once, also when the server is away."""
        with self._writing:
            self._check_open()
            watch = EtcdWatch(
                self._client,
                self._root + prefix,
                self._config.lease_ttl_s,
                lambda key, value: on_change(key.removeprefix(self._root), value),
                self._wake.set,  # the server may be back empty: look after our lease at once
            )
            self._watches.append(watch)
            return watch

    @override
    def close(self) -> None:
        """See `MetadataStore.close`. Waits at most `timeout_s` for a server that is away."""
        with self._writing:
            if self._closed:
                return
            self._closed = True
            lease, self._lease = self._lease, 0
        for watch in self._watches:
            watch.stop()
        if lease and not self._away:
            with contextlib.suppress(MetadataError):  # the lease runs out by itself
                self._client.revoke(lease, min(1.0, self._config.timeout_s))
        self._client.close()  # ends the calls that our threads may sit in
        self._wake.set()
        if self._keeper is not None:
            self._keeper.join()
        for watch in self._watches:
            watch.close()

    def _keep(self) -> None:
        while True:
            self._wake.wait(RETRY_S if self._away else self._config.lease_ttl_s / 3)
            self._wake.clear()
            if self._closed:
                return
            try:
                self._renew()
            except MetadataError as exc:
                with self._writing:
                    if not self._closed:
                        self._note_away(exc)

    def _renew(self) -> None:
        lease = self._lease
        # Outside the lock: with the server away this waits, and `put` must not wait with it.
        alive = lease and self._client.keep_alive(lease)
        with self._writing:
            if self._closed:
                return
            if not alive and self._lease == lease:
                log.warning(
                    "etcd no longer knows our lease; publishing %d keys again", len(self._own)
                )
                self._lease = 0
            self._flush()
            if self._away:
                log.info("etcd is back")
            self._away = False

    def _flush(self) -> None:
        """Write what is pending, under a new lease if there is none. Holds the lock."""
        for last in (False, True):
            if not self._lease:
                self._lease = self._client.grant(self._config.lease_ttl_s)
                self._pending = set(self._own)
            try:
                for key in list(self._pending):
                    value = self._own.get(key)
                    if value is None:
                        self._client.delete(self._root + key, self._lease)
                    else:
                        self._client.put(self._root + key, value, self._lease)
                    self._pending.discard(key)
            except LeaseLost:
                self._lease = 0
                if last:
                    raise
            else:
                return

    def _note_away(self, exc: MetadataError) -> None:
        if not self._away:
            log.warning("%s; own keys are published again when it is back", exc)
        self._away = True

    def _check_open(self) -> None:
        if self._closed:
            raise MetadataError("the metadata store is closed")
