"""The connector's settings, and the one place that reads the file and the environment.

Sources, later wins: defaults < file < environment < `kv_connector_extra_config`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from mooncake_engine.config import EngineConfig, Port, Seconds

if TYPE_CHECKING:
    from collections.abc import Mapping


class ConnectorConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything the connector can be told; `engine` is what it tells the engine."""

    engine: EngineConfig = EngineConfig()
    heartbeat_interval_s: Seconds = 2.0  # from a thread of the node, never from engine steps
    peer_dead_after_s: Seconds = 10.0  # silence after which a peer is dead
    request_timeout_s: Seconds = 300.0  # one request's total, from which every wait draws
    # Router's params can reach decode before prefill's worker has heard of the request.
    unknown_transfer_grace_s: Seconds = 30.0
    control_port: Port = 0  # where peers' messages arrive, on `engine.host`; 0: any
    max_message_bytes: Annotated[int, msgspec.Meta(ge=4096, le=1 << 30)] = 16 << 20
    bootstrap_port: Port = 0  # prefill: serve `GET /query` for vllm-router's mooncake mode; 0: off
    log_level: Literal["debug", "info", "warning", "error"] = "info"
