"""Every environment variable of Mooncake that is honoured here, and those known but not applied.

Names, ranges and defaults as in Mooncake's config.cpp; see docs/configuration.md and docs/rdma.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from msgspec import Meta

from mooncake_connector.config_legacy import device_name, local_hostname, metadata_server, protocol

if TYPE_CHECKING:
    from collections.abc import Callable

PREFIXES = ("MC_", "MOONCAKE_")
STORE = "another part of Mooncake, such as its store"
CONFIG_PATH = "MOONCAKE_CONFIG_PATH"
TENT_CONF = "MC_TENT_CONF"  # TENT's JSON, or the path of a file of it: config_tent.py

_Port = Annotated[int, Meta(ge=1, le=65535)]


class Variable(NamedTuple):
    """One honoured variable."""

    name: str
    type: Any  # what its text must be
    settings: Callable[[Any], dict[str, Any]]  # its value -> dotted settings
    remark: str = ""  # what to say of it when it is met: "it is an old misspelling of ..."
    fallback: bool = False  # meant for another program: counts where no source of ours says


def _sets(*names: str) -> Callable[[Any], dict[str, Any]]:
    return lambda value: dict.fromkeys(names, value)


def _int(low: int, high: int) -> Any:  # noqa: ANN401  # an annotation
    return Annotated[int, Meta(ge=low, le=high)]


def _rdma(name: str, kind: Any, field: str, remark: str = "") -> Variable:  # noqa: ANN401  # an annotation
    return Variable(name, kind, _sets(f"engine.rdma.{field}"), remark)


def _alias(of: str) -> str:
    return f"Mooncake itself knows it as {of} only"


def _devices(field: str) -> Callable[[str], dict[str, Any]]:
    return lambda text: device_name(text, field)


def _force_tcp(on: bool) -> dict[str, Any]:
    return {"engine.protocol": "tcp", "engine.strict_transport": True} if on else {}


def _force_rdma(on: bool) -> dict[str, Any]:
    return {"engine.protocol": "rdma", "engine.strict_transport": True} if on else {}


_first_port, _last_port = (
    _sets(f"engine.tcp.{end}_port", f"engine.rdma.{end}_port", f"engine.metadata.p2p_{end}_port")
    for end in ("min", "max")
)
_Level = Literal["trace", "debug", "info", "warning", "error"]
_Lanes = _int(1, 64)
_GidIndex = _int(-1, 255)
_Text = Annotated[str, Meta(min_length=1)]

#: Of the rdma transport, in order of precedence. The aliases stand in old guides only.
RDMA = (
    _rdma("MC_VERBS_BINDING", Literal["native", "pyverbs"], "binding"),
    _rdma("MC_RDMA_BIND_ADDRESS", str, "bind_address"),
    # which NICs, and which of them for which memory
    Variable("MOONCAKE_DEVICE", str, _devices("devices")),
    Variable("MC_TE_FILTERS", str, _devices("devices")),
    Variable("MC_TE_FILTERS_EXCLUDE", str, _devices("devices_excluded")),
    _rdma("MC_IB_PORT", _int(1, 255), "port"),
    _rdma("NCCL_IB_GID_INDEX", _GidIndex, "gid_index")._replace(fallback=True),
    _rdma("MC_GID_INDEX", _GidIndex, "gid_index"),
    _rdma("MC_PKEY_INDEX", _int(0, 65535), "pkey_index"),
    _rdma("MC_CUSTOM_TOPO_JSON", _Text, "topology_file"),
    _rdma("MC_PATH_ROUNDROBIN", bool, "path_round_robin"),
    _rdma("MC_ENABLE_DEST_DEVICE_AFFINITY", bool, "dest_device_affinity"),
    # one NIC
    _rdma("MC_NUM_CQ_PER_CTX", _int(1, 255), "num_cq"),
    _rdma("MC_NUM_COMP_CHANNELS_PER_CTX", _int(1, 255), "num_comp_channels"),
    _rdma("MC_MAX_CQE_PER_CTX", _int(2, 65535), "max_cqe"),
    _rdma("MC_NUM_CQ_POLL_THREADS", _int(1, 8), "num_workers", _alias("MC_WORKERS_PER_CTX")),
    _rdma("MC_WORKERS_PER_CTX", _int(1, 8), "num_workers"),
    _rdma(
        "MC_ASYNC_TRANSFER_LIMIT",
        _int(1, 1 << 20),
        "max_outstanding",
        "Mooncake itself does not know it; here it limits the work requests under way on one NIC",
    ),
    # one endpoint
    _rdma("MC_RDMA_QP_COUNT", _int(1, 255), "num_qp", _alias("MC_NUM_QP_PER_EP")),
    _rdma("MC_NUM_QP_PER_EP", _int(1, 255), "num_qp"),
    _rdma("MC_RDMA_MAX_WR_DEPTH", _int(1, 65535), "max_wr", _alias("MC_MAX_WR")),
    _rdma("MC_MAX_WR", _int(1, 65535), "max_wr"),
    _rdma(
        "MC_MAX_BATCH_SIZE",
        _int(1, 65535),
        "max_chain",
        "Mooncake itself does not know it; here it limits the work requests posted at once",
    ),
    _rdma("MC_RDMA_MAX_SGE", _int(1, 65535), "max_sge", _alias("MC_MAX_SGE")),
    _rdma("MC_MAX_SGE", _int(1, 65535), "max_sge"),
    _rdma("MC_MAX_INLINE", _int(0, 65535), "max_inline"),
    _rdma("MC_MTU", Literal[512, 1024, 2048, 4096], "mtu"),
    _rdma("MC_IB_TC", _int(-1, 255), "traffic_class"),
    _rdma("MC_IB_SL", _int(-1, 15), "service_level"),
    _rdma("MC_ENDPOINT_STORE_TYPE", Literal["SIEVE", "FIFO"], "endpoint_store"),
    _rdma("MC_MAX_EP_PER_CTX", _int(1, 65536), "max_endpoints"),
    # one slice
    _rdma("MC_SLICE_SIZE", _int(4096, 1 << 30), "slice_bytes"),
    _rdma("MC_FRAGMENT_RATIO", _int(1, 65536), "fragment_ratio"),
    _rdma("MC_RETRY_CNT", _int(1, 127), "retry_count"),
    _rdma("MC_SLICE_TIMEOUT", _int(-1, 65535), "slice_timeout_s"),
    _rdma("MC_RDMA_RAIL_PAUSE_SECONDS", _int(1, 3599), "rail_pause_s"),
    # memory
    _rdma("MC_IB_PCI_RELAXED_ORDERING", Literal[0, 1, 2], "relaxed_ordering"),
    _rdma("MC_MAX_MR_SIZE", _int(4096, 1 << 62), "max_mr_bytes"),
    _rdma("MC_ENABLE_PARALLEL_REG_MR", Literal[-1, 0, 1], "parallel_registration"),
    _rdma("MC_MAX_CONCURRENT_REG_MR", _int(0, 1024), "max_concurrent_registrations"),
    _rdma("WITH_NVIDIA_PEERMEM", bool, "nvidia_peermem"),
)

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
    Variable("MC_FORCE_HCA", bool, _force_rdma),
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
    Variable("MC_MIN_PRC_PORT", _Port, _first_port, "it is an old misspelling of MC_MIN_RPC_PORT"),
    Variable("MC_MAX_PRC_PORT", _Port, _last_port, "it is an old misspelling of MC_MAX_RPC_PORT"),
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
    *RDMA,
)

#: Two that cannot both be on.
OPPOSITES = (("MC_FORCE_TCP", "MC_FORCE_HCA"),)

#: Why -> names that Mooncake knows and we do not apply; a name that ends in `*` is a family.
NOT_APPLIED = {
    "the GID is chosen once, by type and address family; MC_GID_INDEX sets another": (
        "MC_AUTO_GID_MAX_RETRIES",
    ),
    "queue pairs are exchanged over a connection of their own, on MC_MIN_RPC_PORT to MAX": (
        *("MC_HANDSHAKE_PORT", "MC_HANDSHAKE_LISTEN_BACKLOG", "MC_HANDSHAKE_MAX_LENGTH"),
    ),
    "it needs the verbs of one vendor, and only those that all NICs have are used": (
        *("MC_MLX5_QP_UDP_SPORTS", "MC_MLX5_QP_LAG_PORT_BALANCE"),
    ),
    "pairs of NICs are MC_ENABLE_DEST_DEVICE_AFFINITY's or engine.rdma.rail_topology_file's": (
        *("MC_ENABLE_HCA_PEER_AFFINITY", "MC_NIC_PEER_AFFINITY"),
    ),
    "a pair of NICs that failed rests, not its whole peer: MC_RDMA_RAIL_PAUSE_SECONDS": (
        "MC_CONN_PAUSE_TTL_MS",
    ),
    "memory of a GPU goes by GPUDirect RDMA or not at all": ("MC_DISABLE_GPU_DIRECT_RDMA",),
    "transports that this engine does not have": (
        *("MC_FORCE_MNNVL", "MC_ENABLE_MNNVL", "MC_INTRANODE_NVLINK", "MC_INTRA_NVLINK"),
        *("MC_USE_NVLINK_IPC", "MC_MIN_REG_SIZE", "MC_EFA_*", "MC_CXL_*", "MC_NOF_*"),
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
        *("MC_USE_TEV1", "MC_TENT_RPC_THREADS", "MC_REDIS_*", "MC_TCP_ENABLE_CONNECTION_POOL"),
        *("MC_LOG_RDMA_SLICE_AFFINITY", "MC_TRACK_RDMA_POSTED_SLICES"),
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
