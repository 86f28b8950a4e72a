"""Every environment variable of Mooncake that is honoured here, and those known but not applied.

Names, ranges and defaults as in Mooncake's config.cpp; see docs/configuration.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from msgspec import Meta

from mooncake_connector.config_legacy import local_hostname, metadata_server, protocol

if TYPE_CHECKING:
    from collections.abc import Callable

PREFIXES = ("MC_", "MOONCAKE_")
STORE = "another part of Mooncake, such as its store"
CONFIG_PATH = "MOONCAKE_CONFIG_PATH"

_Port = Annotated[int, Meta(ge=1, le=65535)]


class Variable(NamedTuple):
    """One honoured variable."""

    name: str
    type: Any  # what its text must be
    settings: Callable[[Any], dict[str, Any]]  # its value -> dotted settings
    instead: str = ""  # the right name, when this one is an old misspelling


def _sets(*names: str) -> Callable[[Any], dict[str, Any]]:
    return lambda value: dict.fromkeys(names, value)


def _force_tcp(on: bool) -> dict[str, Any]:
    return {"engine.protocol": "tcp", "engine.strict_transport": True} if on else {}


_first_port = _sets("engine.tcp.min_port", "engine.metadata.p2p_min_port")
_last_port = _sets("engine.tcp.max_port", "engine.metadata.p2p_max_port")
_Level = Literal["trace", "debug", "info", "warning", "error"]
_Lanes = Annotated[int, Meta(ge=1, le=64)]

#: In order of precedence: of two that set one setting, the later wins.
VARIABLES = (
    Variable(
        "MOONCAKE_TE_META_DATA_SERVER",
        str,
        lambda text: metadata_server(text, "MOONCAKE_TE_META_DATA_SERVER"),
    ),
    Variable("MOONCAKE_PROTOCOL", str, lambda text: protocol(text, "MOONCAKE_PROTOCOL")),
    Variable("MOONCAKE_LOCAL_HOSTNAME", str, local_hostname),
    Variable("MC_FORCE_TCP", bool, _force_tcp),
    Variable(
        "MC_METADATA_CLUSTER_ID",
        Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]+$")],
        _sets("engine.metadata.cluster"),
    ),
    Variable(
        "MC_TRANSFER_TIMEOUT",
        Annotated[int, Meta(ge=5, le=86400)],
        _sets("engine.transfer_timeout_s"),
    ),
    Variable(
        "MC_HANDSHAKE_CONNECT_TIMEOUT",
        Annotated[int, Meta(ge=1, le=86400)],
        _sets("engine.connect_timeout_s"),
    ),
    Variable("MC_MIN_PRC_PORT", _Port, _first_port, instead="MC_MIN_RPC_PORT"),
    Variable("MC_MAX_PRC_PORT", _Port, _last_port, instead="MC_MAX_RPC_PORT"),
    Variable("MC_MIN_RPC_PORT", _Port, _first_port),
    Variable("MC_MAX_RPC_PORT", _Port, _last_port),
    Variable("MC_TCP_BIND_ADDRESS", str, _sets("engine.tcp.bind_address")),
    Variable(
        "MC_TCP_SLICE_SIZE",
        Annotated[int, Meta(ge=4096, le=1 << 30)],
        _sets("engine.tcp.slice_bytes"),
    ),
    # A cap on connections is a cap on lanes here: a lane is one connection.
    Variable("MC_TCP_MAX_CONNECTIONS_PER_PEER", _Lanes, _sets("engine.tcp.lanes_per_peer")),
    Variable("MC_TCP_LANES_PER_PEER", _Lanes, _sets("engine.tcp.lanes_per_peer")),
    Variable(
        "MC_LOG_LEVEL",
        _Level,
        lambda level: {"log_level": "debug" if level == "trace" else level},
    ),
)

#: Why -> names that Mooncake knows and we do not apply; a name that ends in `*` is a family.
NOT_APPLIED = {
    "RDMA, and this version has no RDMA transport": (
        *("MC_NUM_CQ_PER_CTX", "MC_NUM_COMP_CHANNELS_PER_CTX", "MC_IB_PORT", "MC_GID_INDEX"),
        *("MC_AUTO_GID_MAX_RETRIES", "MC_PKEY_INDEX", "MC_MAX_MR_SIZE", "MC_MIN_REG_SIZE"),
        *("MC_MAX_CQE_PER_CTX", "MC_MAX_EP_PER_CTX", "MC_NUM_QP_PER_EP", "MC_MAX_SGE"),
        *("MC_MAX_WR", "MC_MAX_INLINE", "MC_MTU", "MC_HANDSHAKE_PORT", "MC_WORKERS_PER_CTX"),
        *("MC_HANDSHAKE_LISTEN_BACKLOG", "MC_HANDSHAKE_MAX_LENGTH", "MC_SLICE_SIZE"),
        *("MC_FRAGMENT_RATIO", "MC_RETRY_CNT", "MC_SLICE_TIMEOUT", "MC_CONN_PAUSE_TTL_MS"),
        *("MC_RDMA_RAIL_PAUSE_SECONDS", "MC_RDMA_BIND_ADDRESS", "MC_ENDPOINT_STORE_TYPE"),
        *("MC_IB_TC", "MC_IB_SL", "MC_IB_PCI_RELAXED_ORDERING", "MC_MLX5_QP_UDP_SPORTS"),
        *("MC_MLX5_QP_LAG_PORT_BALANCE", "MC_ENABLE_DEST_DEVICE_AFFINITY"),
        *("MC_ENABLE_HCA_PEER_AFFINITY", "MC_NIC_PEER_AFFINITY", "MC_LOG_RDMA_SLICE_AFFINITY"),
        *("MC_TRACK_RDMA_POSTED_SLICES", "MC_ENABLE_PARALLEL_REG_MR"),
        *("MC_MAX_CONCURRENT_REG_MR", "MC_PATH_ROUNDROBIN", "MC_TE_FILTERS", "MC_FORCE_HCA"),
        *("MC_TE_FILTERS_EXCLUDE", "MC_CUSTOM_TOPO_JSON", "MOONCAKE_DEVICE"),
        # in old guides, not in Mooncake's source
        *("MC_NUM_CQ_POLL_THREADS", "MC_MAX_BATCH_SIZE", "MC_ASYNC_TRANSFER_LIMIT"),
        *("MC_RDMA_MAX_WR_DEPTH", "MC_RDMA_MAX_SGE", "MC_RDMA_QP_COUNT"),
    ),
    "transports that this engine does not have": (
        *("MC_FORCE_MNNVL", "MC_ENABLE_MNNVL", "MC_INTRANODE_NVLINK", "MC_INTRA_NVLINK"),
        *("MC_USE_NVLINK_IPC", "MC_DISABLE_GPU_DIRECT_RDMA", "MC_EFA_*", "MC_CXL_*", "MC_NOF_*"),
        *("MC_NVME_*", "MC_HIP_*", "MC_MACA_*", "MC_MUSA_*", "MC_UBSHMEM_*", "MC_TPU_*"),
        *("MC_SUNRISE_*",),
    ),
    STORE: (
        *("MC_STORE_*", "MC_MMAP_ARENA_POOL_SIZE", "MC_DISABLE_MMAP_ARENA", "MC_MS_*", "MC_RPC_*"),
        *("MOONCAKE_STORE_*", "MOONCAKE_MASTER", "MOONCAKE_GLOBAL_SEGMENT_SIZE"),
        *("MOONCAKE_LOCAL_BUFFER_SIZE", "MOONCAKE_OFFLOAD_*", "MOONCAKE_TENANT_ID"),
    ),
    "Mooncake's own engine, which is not used here": (
        *("MC_DISABLE_METACACHE", "MC_TE_METADATA_REFRESH_INTERVAL_SECONDS", "MC_LOG_DIR"),
        *("MC_YLT_LOG_LEVEL", "MC_LEGACY_RPC_PORT_BINDING", "MC_TE_METRIC*", "MC_USE_TENT"),
        *("MC_USE_TEV1", "MC_TENT_*", "MC_REDIS_*", "MC_TCP_ENABLE_CONNECTION_POOL"),
        *("MC_TCP_PROTO", "MC_TCP_MAX_PENDING_ADMISSIONS_PER_PEER"),
        *("MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER", "MC_TCP_ADMISSION_TIMEOUT_MS"),
        *("MC_TCP_STATUS_TIMEOUT_SEC",),
    ),
    "nothing here: the addresses decide; set engine.host to an IPv6 address": ("MC_USE_IPV6",),
}

#: Other programs that own the prefix: Midnight Commander's subshell, MinIO's client. Silent.
FOREIGN = (
    *("MC_SID", "MC_TMPDIR", "MC_DATADIR", "MC_HOME", "MC_SKIN", "MC_KEYMAP", "MC_COLOR_TABLE"),
    *("MC_XDG_OPEN", "MC_PROFILE_ROOT", "MC_LIBDIR", "MC_HOST_*", "MC_CONFIG_*"),
)
