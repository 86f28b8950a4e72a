"""Settings that are right one by one and wrong together. Pure."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

from mooncake_engine.errors import ConfigError

if TYPE_CHECKING:
    from mooncake_engine.config import EngineConfig, MetadataConfig, RdmaConfig

    from mooncake_connector.config import ConnectorConfig


def check_together(config: ConnectorConfig) -> None:
    """Raises `ConfigError` for the first contradiction, naming both settings and a way out."""
    if config.heartbeat_interval_s >= config.peer_dead_after_s:
        raise ConfigError(
            f"heartbeat_interval_s is {config.heartbeat_interval_s:g} but peer_dead_after_s is "
            f"{config.peer_dead_after_s:g}; the interval must be shorter, 5 beats are usual"
        )
    _check_ports(config.engine)
    _check_metadata(config.engine.metadata)
    _check_rdma(config.engine.rdma)
    if _is_wildcard(config.engine.host):
        raise ConfigError(
            f"engine.host is {config.engine.host!r}, which no peer can connect to; name an address "
            "of this machine (to listen on all, set engine.tcp.bind_address)"
        )


def _check_ports(engine: EngineConfig) -> None:
    for section, low, high in (
        ("engine.tcp.{}_port", engine.tcp.min_port, engine.tcp.max_port),
        ("engine.rdma.{}_port", engine.rdma.min_port, engine.rdma.max_port),
        (
            "engine.metadata.p2p_{}_port",
            engine.metadata.p2p_min_port,
            engine.metadata.p2p_max_port,
        ),
    ):
        if low > high or (low == 0) != (high == 0):
            raise ConfigError(
                f"{section.format('min')} is {low} and {section.format('max')} is {high}; "
                "expected min <= max, or 0 in both for any port"
            )


def _check_metadata(metadata: MetadataConfig) -> None:
    if metadata.backend == "etcd" and not metadata.endpoints:
        raise ConfigError(
            "engine.metadata.backend is 'etcd' but engine.metadata.endpoints is empty; "
            'name at least one "host:2379"'
        )
    if metadata.endpoints and metadata.backend != "etcd":
        raise ConfigError(
            f"engine.metadata.endpoints is {list(metadata.endpoints)} but engine.metadata.backend "
            f"is {metadata.backend!r}; set the backend to 'etcd' or remove the endpoints"
        )
    for first, second in (("client_cert", "client_key"), ("username", "password")):
        if bool(getattr(metadata, first)) != bool(getattr(metadata, second)):
            raise ConfigError(f"engine.metadata.{first} and {second} go together; set both")
    if metadata.client_cert and not metadata.ca_cert:
        raise ConfigError("engine.metadata.client_cert is set but ca_cert is empty; set ca_cert")


def _check_rdma(rdma: RdmaConfig) -> None:
    both = sorted({*rdma.devices} & {*rdma.devices_excluded})
    if both:
        raise ConfigError(
            f"engine.rdma.devices and engine.rdma.devices_excluded both name {', '.join(both)}; "
            "remove it from one of them"
        )
    # One queue pair alone could overflow its completion queue when all that is posted is flushed.
    if rdma.max_wr > rdma.max_cqe:
        raise ConfigError(
            f"engine.rdma.max_wr (MC_MAX_WR) is {rdma.max_wr} but engine.rdma.max_cqe "
            f"(MC_MAX_CQE_PER_CTX) is {rdma.max_cqe}; a completion queue holds at least what one "
            "send queue does: raise max_cqe or lower max_wr"
        )
    # max_chain needs no such check: a post is never longer than its send queue has room for.


def _is_wildcard(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False
