"""One watched prefix: tells the death of a publisher from the amnesia of the server."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

from typing_extensions import override

from mooncake_engine.errors import MetadataError
from mooncake_engine.metadata.base import OnChange, Watch
from mooncake_engine.metadata.etcd_types import Entry, RevisionGone

if TYPE_CHECKING:
    from collections.abc import Callable

    from mooncake_engine.metadata.etcd import EtcdClient
    from mooncake_engine.metadata.etcd_stream import EtcdStream

log = logging.getLogger(__name__)

RETRY_S = 0.5  # pause after a failure; each try itself waits up to timeout_s for the server


class EtcdWatch(Watch):
    """Lists, then follows; after a break lists again and reports the difference.

    Did a key that is missing after a break die, or did the server forget it? The server is asked
    for the prefix as of the last revision we saw. If it answers exactly what we knew, its history
    is intact and the key is gone. If it cannot (an empty restart starts again at revision 1, and
    what others published since has other revisions), the key has `patience_s` to come back.
    """

    def __init__(
        self,
        client: EtcdClient,
        prefix: str,
        patience_s: float,
        on_change: OnChange,
        on_contact: Callable[[], None],
    ) -> None:
        """Args: on_contact: called after each listing: the server is there (again)."""
        self._client = client
        self._prefix = prefix
        self._patience_s = patience_s
        self._on_change = on_change
        self._on_contact = on_contact
        self._known: dict[str, Entry] = {}  # what the server has, as far as we heard
        self._revision = 0
        self._reported: dict[str, bytes] = {}  # what the caller believes
        self._missing: dict[str, float] = {}  # reported, not on the server -> believed until
        self._lock = threading.Lock()  # guards _stream against a close() while it is opened
        self._stream: EtcdStream | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"etcd-watch {prefix}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End soon, without waiting."""
        with self._lock:
            self._closed.set()
            stream = self._stream
        if stream is not None:
            stream.close()

    @override
    def close(self) -> None:
        """Stop and wait for the thread, which may sit in one call of at most `timeout_s`."""
        self.stop()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        well = True
        while not self._closed.is_set():
            try:
                self._catch_up()
                if not well:
                    log.info("watching %s again", self._prefix)
                well = True
                self._on_contact()
                self._follow()
            except MetadataError as exc:
                self._missing.clear()  # their time starts anew when the server is back
                if self._closed.is_set():
                    return
                if well:
                    log.warning("watch of %s: %s; known peers are kept", self._prefix, exc)
                well = False
                self._closed.wait(RETRY_S)

    def _catch_up(self) -> None:
        revision, found = self._client.range(self._prefix)
        lost = self._reported.keys() - found.keys()
        # Asked after the listing: a server that is emptied in between only earns patience.
        intact = bool(lost) and self._history_is_intact()
        now = time.monotonic()
        for key, entry in found.items():
            self._report(key, entry.value)
        for key in lost:
            if intact and key in self._known:
                self._report(key, None)
            elif self._missing.setdefault(key, now + self._patience_s) <= now:
                log.warning("%s did not come back within %g s", key, self._patience_s)
                self._report(key, None)
        self._known, self._revision = found, revision

    def _history_is_intact(self) -> bool:
        try:
            _, then = self._client.range(self._prefix, self._revision)
        except RevisionGone:
            return False
        return then == self._known

    def _follow(self) -> None:
        timeout = None
        if self._missing:
            timeout = max(0.01, min(self._missing.values()) - time.monotonic())
        with self._lock:
            if self._closed.is_set():
                return
            stream = self._stream = self._client.watch(self._prefix, self._revision + 1, timeout)
        try:
            for changes in stream:
                for key, value, revision in changes:
                    self._revision = max(self._revision, revision)
                    if value is None:
                        self._known.pop(key, None)
                    else:
                        self._known[key] = Entry(value, revision)
                    self._report(key, value)
        finally:
            stream.close()

    def _report(self, key: str, value: bytes | None) -> None:
        self._missing.pop(key, None)
        if self._reported.get(key) == value or self._closed.is_set():
            return
        if value is None:
            del self._reported[key]
        else:
            self._reported[key] = value
        try:
            self._on_change(key, value)
        except Exception:  # a caller's mistake must not blind the node
            log.exception("the callback for %s failed", key)
