"""Entry point `vllm.general_plugins`: makes the connector known by name in every vLLM process."""

from __future__ import annotations

NAME = "MooncakeDisaggConnector"


def register() -> None:
    """Tell vLLM's factory where the connector is; may be called more than once."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    try:
        KVConnectorFactory.register_connector(NAME, "mooncake_connector.vllm.connector", NAME)
    except ValueError:  # already registered in this process: the factory's only complaint
        return
