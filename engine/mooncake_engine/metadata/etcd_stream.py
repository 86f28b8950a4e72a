"""One watch on the wire."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import grpc

from mooncake_engine.metadata.etcd_types import Change, EtcdAway, RevisionGone

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class EtcdStream:
    """Changes as etcd sends them: iterate over lists of `Change`; `close` ends it, any thread."""

    def __init__(
        self, opener: Callable[[Iterator[Any]], Any], request: object, revision: int, address: str
    ) -> None:
        """Open the stream; does not block.

        Args:
            opener: Starts the gRPC call, given the requests to send.
            request: The one that asks for the watch.
            revision: First revision to report.
            address: Of the server, for errors.
        """
        self._request = request
        self._revision = revision
        self._address = address
        self._done = threading.Event()
        self._requester: threading.Thread | None = None
        self._call = opener(self._requests())

    def _requests(self) -> Iterator[object]:
        self._requester = threading.current_thread()
        yield self._request
        self._done.wait()  # a half-closed watch is ended by etcd's gRPC proxy

    def __iter__(self) -> Iterator[list[Change]]:
        """Ends when the time-out passed or `close` was called.

        Raises:
            MetadataError: The stream broke, or the server's history does not reach our revision.
        """
        try:
            for response in self._call:
                if response.created and response.header.revision < self._revision - 1:
                    raise RevisionGone(f"etcd at {self._address} lost its data")
                if response.canceled:
                    raise RevisionGone(
                        f"etcd at {self._address} ended the watch: {response.cancel_reason}"
                    )
                yield [
                    Change(
                        event.kv.key.decode(),
                        None if event.type == event.DELETE else event.kv.value,
                        event.kv.mod_revision,
                    )
                    for event in response.events
                ]
        except grpc.RpcError as exc:
            if exc.code() not in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
                raise EtcdAway(f"etcd at {self._address}: {exc.details()}") from exc

    def close(self) -> None:
        """End the iteration and the stream's thread; idempotent."""
        self._call.cancel()
        self._done.set()
        if self._requester is not None:
            self._requester.join(1)
