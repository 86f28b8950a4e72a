"""A node in the cluster: its record in the metadata store, and the prefill nodes it finds there."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from typing import TYPE_CHECKING, Self

from mooncake_engine.hosts import own_address

from mooncake_connector.bootstrap import BootstrapError, BootstrapServer
from mooncake_connector.cluster import NODES, NodeRecord, decode_node, encode_node, node_key
from mooncake_connector.errors import WireError
from mooncake_connector.peers import PeerRef

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mooncake_engine.metadata.base import MetadataStore, Watch

    from mooncake_connector.config import ConnectorConfig
    from mooncake_connector.node import Node

log = logging.getLogger(__name__)


class Publication:
    """Publishes a node while it is entered; a decode node also connects to prefill nodes early.

    Connecting when a prefill node appears, not when its first request does, keeps the handshake
    out of that request's time to first token.
    """

    def __init__(self, store: MetadataStore, node: Node, record: NodeRecord) -> None:
        """`record` is what to publish about `node`."""
        self._store = store
        self._node = node
        self._record = record
        self._key = node_key(record.engine_id, record.rank)
        self._watch: Watch | None = None

    def __enter__(self) -> Self:
        """Publish; raises `MetadataError` when the store cannot be reached."""
        self._store.put(self._key, encode_node(self._record))
        if self._record.role != "kv_producer":
            self._watch = self._store.watch(NODES, self._on_change)
        return self

    def __exit__(self, *exc: object) -> None:
        """Withdraw."""
        if self._watch is not None:
            self._watch.close()
        self._store.delete(self._key)

    def _on_change(self, key: str, value: bytes | None) -> None:
        if value is None or key == self._key:
            return
        try:
            record = decode_node(key, value)
        except WireError as exc:
            log.warning("ignored: %s", exc)
            return
        known, ours = (record.framework, record.rank), (self._record.framework, self._record.rank)
        if record.role != "kv_consumer" and known == ours:
            self._node.connect(
                PeerRef(
                    address=record.control,
                    incarnation=record.incarnation,
                    engine_id=record.engine_id,
                    rank=record.rank,
                )
            )


class Bootstrap:
    """The bootstrap server on a thread of its own, for the process that knows all ranks.

    A port that is taken is logged and does not stop the engine: only routers in mooncake mode
    need it.
    """

    def __init__(
        self, config: ConnectorConfig, engine_id: str, addresses: Mapping[int, str]
    ) -> None:
        self._server = BootstrapServer(
            own_address(config.engine),
            config.bootstrap_port,
            engine_id=engine_id,
            worker_addresses=addresses,
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="mooncake-bootstrap", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving. Idempotent."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the port was taken
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5.0)

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._server.start())
            log.info("bootstrap server at http://%s:%d", self._server.host, self._server.port)
            self._loop.run_forever()
            self._loop.run_until_complete(self._server.stop())
        except BootstrapError as exc:
            log.error("%s", exc)  # noqa: TRY400  # the message says it all, a traceback hides it
        finally:
            self._loop.close()
