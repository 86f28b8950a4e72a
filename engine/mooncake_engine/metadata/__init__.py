"""Metadata stores: etcd, p2p (no server), memory (one process)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mooncake_engine.config import MetadataConfig
    from mooncake_engine.metadata.base import MetadataStore


def open_store(config: MetadataConfig, host: str) -> MetadataStore:
    """The store that `config.backend` names; the caller closes it.

    Args:
        config: Where to find it. etcd is not contacted before the first call.
        host: Address that peers reach this process at; p2p listens there.

    Raises:
        ConfigError: Endpoints or PEM files of no use.
        MetadataError: p2p finds no port to listen on.
    """
    # Imported here: gRPC takes 90 ms and 20 MB, which p2p users need not pay.
    if config.backend == "etcd":
        from mooncake_engine.metadata.etcd_store import EtcdStore

        return EtcdStore(config)
    if config.backend == "p2p":
        from mooncake_engine.metadata.p2p import P2pStore

        return P2pStore(config, host)
    from mooncake_engine.metadata.memory import MemoryStore

    return MemoryStore(config)
