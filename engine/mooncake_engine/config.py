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
    native: bool = True  # the loops in C, where they were built; false: their Python twins


class ShmConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Same machine, one copy: process_vm_readv/writev, or a memfd for memory of the engine."""

    # Yama's ptrace_scope 1 (Ubuntu): permit any process of our user to read this one's memory.
    allow_any_reader: bool = True
    threads: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4
    native: bool = True  # as for tcp
    # Put a memfd under registered CPU memory, so that peers of this machine map it and copy large
    # batches by memcpy. Nothing may write to it while it is registered or unregistered, and no
    # device may have pinned it before (cudaHostRegister).
    share_registered: bool = False


class RdmaConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """NICs with verbs (InfiniBand, RoCE). docs/rdma.md has each field's Mooncake and TENT name."""

    binding: Literal["native", "pyverbs"] = "native"
    bind_address: str = ""  # of the control socket; empty: `EngineConfig.host`
    min_port: Port = 15000  # control port is the first free one of the range; 0 in both: any
    max_port: Port = 17000

    # Which NICs, and which of them for which memory.
    devices: tuple[str, ...] = ()  # names; empty: all
    devices_excluded: tuple[str, ...] = ()
    port: Annotated[int, msgspec.Meta(ge=1, le=255)] = 1
    gid_index: Annotated[int, msgspec.Meta(ge=-1, le=255)] = -1  # -1: chosen by type and family
    pkey_index: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0
    topology_file: str = ""  # a priority matrix, or the path of one, instead of what sysfs tells
    rail_topology_file: str = ""  # measured pairs of NICs, from `mooncake-connector topology`
    path_round_robin: bool = False  # deal slices to rails in turn, not in contiguous shares
    dest_device_affinity: bool = False  # prefer the peer's NIC of the same name

    # One NIC.
    num_cq: Annotated[int, msgspec.Meta(ge=1, le=255)] = 1
    num_comp_channels: Annotated[int, msgspec.Meta(ge=1, le=255)] = 1
    max_cqe: Annotated[int, msgspec.Meta(ge=2, le=65535)] = 4096  # of which probes have a few
    num_workers: Annotated[int, msgspec.Meta(ge=1, le=64)] = 2  # threads that await completions
    poll_us: Annotated[float, msgspec.Meta(ge=0, le=50_000)] = 50.0  # polled before it is slept on
    max_outstanding: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)] = 4096  # work requests

    # One endpoint: the queue pairs between one of our NICs and one of a peer's.
    num_qp: Annotated[int, msgspec.Meta(ge=1, le=255)] = 2
    max_wr: Annotated[int, msgspec.Meta(ge=1, le=65535)] = 256
    # Work requests in one post; a send queue of fewer (max_wr) takes fewer.
    max_chain: Annotated[int, msgspec.Meta(ge=1, le=65535)] = 256
    max_sge: Annotated[int, msgspec.Meta(ge=1, le=65535)] = 4
    max_inline: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 64
    mtu: Literal[256, 512, 1024, 2048, 4096] = 4096
    traffic_class: Annotated[int, msgspec.Meta(ge=-1, le=255)] = -1  # -1: 0
    service_level: Annotated[int, msgspec.Meta(ge=-1, le=15)] = -1  # -1: 0
    hop_limit: Annotated[int, msgspec.Meta(ge=1, le=255)] = 64
    flow_label: Annotated[int, msgspec.Meta(ge=0, le=(1 << 20) - 1)] = 0
    src_path_bits: Annotated[int, msgspec.Meta(ge=0, le=127)] = 0
    static_rate: Annotated[int, msgspec.Meta(ge=0, le=255)] = 0
    max_rd_atomic: Annotated[int, msgspec.Meta(ge=1, le=255)] = 16  # READs under way, as initiator
    max_dest_rd_atomic: Annotated[int, msgspec.Meta(ge=1, le=255)] = 16  # and as target
    min_rnr_timer: Annotated[int, msgspec.Meta(ge=0, le=31)] = 12
    send_timeout: Annotated[int, msgspec.Meta(ge=1, le=31)] = 14  # 4.096 us * 2**this
    send_retry_count: Annotated[int, msgspec.Meta(ge=0, le=6)] = 6  # 7 means for ever on some NICs
    send_rnr_count: Annotated[int, msgspec.Meta(ge=0, le=7)] = 7
    endpoint_store: Literal["SIEVE", "FIFO"] = "SIEVE"
    max_endpoints: Annotated[int, msgspec.Meta(ge=1, le=65536)] = 65536

    # One slice: what one work request moves.
    slice_bytes: Annotated[int, msgspec.Meta(ge=4096, le=1 << 30)] = 64 << 10
    fragment_ratio: Annotated[int, msgspec.Meta(ge=1, le=65536)] = 4  # a tail < slice/this joins
    retry_count: Annotated[int, msgspec.Meta(ge=1, le=127)] = 9  # over rails
    slice_timeout_s: Annotated[float, msgspec.Meta(ge=-1, le=65535)] = -1.0  # <= 0: the NIC's alone
    rail_pause_s: Seconds = 30.0  # a failed rail rests
    rail_error_threshold: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 1
    rail_error_window_s: Seconds = 10.0

    # Memory.
    # 0: off. 1: on where there is support. 2: automatic, which here means for memory of a GPU, that
    # gains by it, and off for the host's; Mooncake's 2 is automatic too and does what its 1 does.
    relaxed_ordering: Literal[0, 1, 2] = 1
    max_mr_bytes: Annotated[int, msgspec.Meta(ge=4096, le=1 << 62)] = 1 << 40
    parallel_registration: Literal[-1, 0, 1] = -1
    max_concurrent_registrations: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 0  # 0: no limit
    nvidia_peermem: bool = False  # GPU memory by its kernel module, not by DMA-BUF


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
    rdma: RdmaConfig = RdmaConfig()
