"""Errors of the connector; those of the engine are in `mooncake_engine.errors`.

ConnectorError
├── WireError            a peer sent what is not a message of ours; its connection is closed
├── PeerUnreachable      a peer's control endpoint cannot be reached or refused us
└── UnsupportedCache     a KV cache that the connector cannot move; said at start-up
"""

from __future__ import annotations


class ConnectorError(Exception):
    """Base of all errors that the connector raises."""


class WireError(ConnectorError):
    """A peer sent what is not a message of ours; only its connection suffers."""


class PeerUnreachable(ConnectorError):
    """A peer's control endpoint cannot be reached, or it refused us and said why."""


class UnsupportedCache(ConnectorError):
    """A KV cache that the connector cannot move; raised at start-up, never at a request."""
