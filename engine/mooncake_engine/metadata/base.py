"""Where engines and nodes publish what peers need to find them.

Keys are paths without a leading slash, below one cluster: `segments/<name>`,
`nodes/<engine_id>/<rank>`. A store prefixes them with `mooncake/<cluster>/`. Values are opaque.
"""

from __future__ import annotations

import abc
from collections.abc import Callable

#: Called with (key, value); value is None when the key is gone. Runs on a thread of the store:
#: it must not block and must not call back into the store.
OnChange = Callable[[str, bytes | None], None]


class Watch(abc.ABC):
    """A running watch."""

    @abc.abstractmethod
    def close(self) -> None:
        """Stop; no callback runs after this returned. Idempotent."""


class MetadataStore(abc.ABC):
    """Leased keys and watches. Safe to call from any thread."""

    @abc.abstractmethod
    def put(self, key: str, value: bytes) -> None:
        """Publish `value` for as long as this store object lives.

        The key is leased: it disappears within the lease's time when the process dies, and is
        published again when the server comes back empty.

        Raises:
            MetadataError: When the server refuses. A server that is away raises only on the
                first put of a store; later ones are kept and published when it is back.
        """

    @abc.abstractmethod
    def delete(self, key: str) -> None:
        """Take back what `put` published; no error when it is not there."""

    @abc.abstractmethod
    def get(self, key: str) -> bytes | None:
        """The value, or None. Raises `MetadataError` when the server cannot be reached."""

    @abc.abstractmethod
    def list(self, prefix: str) -> dict[str, bytes]:
        """All keys below `prefix`. Raises `MetadataError` when the server cannot be reached."""

    @abc.abstractmethod
    def watch(self, prefix: str, on_change: OnChange) -> Watch:
        """Report every key below `prefix`, those already there first, then each change.

        Survives an outage of the server: afterwards the difference is reported. Keys that
        vanished because the *server* lost its data are reported gone only if they stay away
        for one lease time, so that an empty restart does not look like the death of everybody.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Take back all keys of this store, stop all watches and threads. Idempotent."""
