"""A table of keys in this process, with watches; what the stores without a server stand on."""

from __future__ import annotations

import logging
import queue
import threading
from typing import TYPE_CHECKING

from typing_extensions import override

from mooncake_engine.metadata.base import OnChange, Watch

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)


class LocalTable:
    """Keys and those who watch them. Safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards both; also keeps changes in one order for all
        self._values: dict[str, tuple[bytes, object]] = {}
        self._watches: list[LocalWatch] = []

    def put(self, key: str, value: bytes, owner: object) -> None:
        """Write; the last writer owns the key."""
        with self._lock:
            self._values[key] = value, owner
            self._tell(key, value)

    def delete(self, key: str, owner: object) -> None:
        """Delete the key if `owner` wrote it last."""
        with self._lock:
            if key in self._values and self._values[key][1] is owner:
                del self._values[key]
                self._tell(key, None)

    def delete_all(self, owner: object) -> None:
        """Delete all that `owner` wrote last."""
        with self._lock:
            for key in [k for k, (_, whose) in self._values.items() if whose is owner]:
                del self._values[key]
                self._tell(key, None)

    def get(self, key: str) -> bytes | None:
        """The value, or None."""
        with self._lock:
            return self._values[key][0] if key in self._values else None

    def list(self, prefix: str) -> dict[str, bytes]:
        """All keys that start with `prefix`."""
        with self._lock:
            return {k: value for k, (value, _) in self._values.items() if k.startswith(prefix)}

    def watch(self, prefix: str, on_change: OnChange) -> LocalWatch:
        """Report what is there, then each change, on a thread of the watch."""
        watch = LocalWatch(prefix, on_change, self._forget)
        with self._lock:
            self._watches.append(watch)
            for key, (value, _) in self._values.items():
                watch.tell(key, value)
        return watch

    def _tell(self, key: str, value: bytes | None) -> None:
        for watch in self._watches:
            watch.tell(key, value)

    def _forget(self, watch: LocalWatch) -> None:
        with self._lock:
            if watch in self._watches:
                self._watches.remove(watch)


class LocalWatch(Watch):
    """One watched prefix; its thread runs the callback so that no writer waits for it."""

    def __init__(
        self, prefix: str, on_change: OnChange, forget: Callable[[LocalWatch], None]
    ) -> None:
        self._prefix = prefix
        self._on_change = on_change
        self._forget = forget
        self._closed = False
        self._changes: queue.SimpleQueue[tuple[str, bytes | None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"watch {prefix}", daemon=True)
        self._thread.start()

    def tell(self, key: str, value: bytes | None) -> None:
        """Queue a change for the callback."""
        if key.startswith(self._prefix):
            self._changes.put((key, value))

    @override
    def close(self) -> None:
        """See `Watch.close`."""
        self._closed = True
        self._forget(self)
        self._changes.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while (change := self._changes.get()) is not None:
            if self._closed:
                return
            try:
                self._on_change(*change)
            except Exception:  # a caller's mistake must not blind the watch
                log.exception("the callback for %s failed", change[0])
