"""The engine's settings: frozen, checked, with every default in one place.

Decoding checks types and ranges. The engine reads no file and no environment variable; its user
does (the connector: `mooncake_connector.config`).
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from typing_extensions import override

Seconds = Annotated[float, msgspec.Meta(gt=0, le=86400)]
Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]


class MetadataConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where peers find each other."""

    backend: Literal["p2p", "etcd", "memory"] = "p2p"
    endpoints: tuple[str, ...] = ()  # etcd: "host:2379", tried in order
    cluster: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.-]+$")] = "default"
    username: str = ""
    password: str = ""
    ca_cert: str = ""  # paths of PEM files; TLS is used when ca_cert is set
    client_cert: str = ""
    client_key: str = ""
    lease_ttl_s: Annotated[int, msgspec.Meta(ge=2, le=3600)] = 10
    timeout_s: Seconds = 3.0  # bounds each call to the server or to a p2p peer
    p2p_min_port: Port = 15000  # p2p answers on the first free port of the range; 0 in both: any
    p2p_max_port: Port = 17000

    @override
    def __repr__(self) -> str:
        """As usual but for the password: settings end up in logs."""
        shown = msgspec.structs.asdict(self) | {"password": "***" if self.password else ""}
        return f"MetadataConfig({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


class TcpConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sockets."""

    bind_address: str = ""  # empty: `EngineConfig.host`; never all interfaces unless written here
    min_port: Port = 15000  # data port is the first free one of the range; 0 in both: any
    max_port: Port = 17000
    lanes_per_peer: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4
    max_served_lanes: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 256
    slice_bytes: Annotated[int, msgspec.Meta(ge=4096, le=1 << 30)] = 8 << 20
    send_timeout_s: Seconds = 10.0  # a reader that stopped taking bytes loses its lane


class ShmConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Same machine, one copy: process_vm_readv/writev, or a memfd for memory of the engine."""

    # Yama's ptrace_scope 1 (Ubuntu): permit any process of our user to read this one's memory.
    allow_any_reader: bool = True
    threads: Annotated[int, msgspec.Meta(ge=1, le=64)] = 2


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything the engine can be told."""

    protocol: Literal["auto", "tcp", "shm", "rdma", "loopback"] = "auto"
    strict_transport: bool = False  # refuse any path but `protocol`'s
    host: str = ""  # address that peers use; empty: the one that reaches the default route
    transfer_timeout_s: Seconds = 30.0  # a batch ends TIMED_OUT after this
    connect_timeout_s: Seconds = 5.0
    metadata: MetadataConfig = MetadataConfig()
    tcp: TcpConfig = TcpConfig()
    shm: ShmConfig = ShmConfig()
