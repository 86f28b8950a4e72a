"""The JSON of TENT, Mooncake's newer engine (`MC_TENT_CONF`), told in today's settings. Pure.

Keys are TENT's paths: `transports/rdma/device/port` is nested objects, or that very text.
"""

from __future__ import annotations

import fnmatch
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from mooncake_engine.config import RdmaConfig
from mooncake_engine.errors import ConfigError
from msgspec import Meta

from mooncake_connector import config_fields
from mooncake_connector.config_legacy import BACKEND, ENDPOINTS, metadata_server

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_RDMA = config_fields.fields_of(RdmaConfig)
_LANES = ("num_workers", "num_cq", "num_qp")
_MATRIX = "topology/priority_matrix"
_RETRY = "transports/rdma/endpoint/send_retry_count"


class Key(NamedTuple):
    """One honoured key."""

    type: Any
    settings: Callable[[Any], dict[str, Any]]


class Translation(NamedTuple):
    """A TENT tree, taken apart."""

    settings: dict[str, Any]  # dotted name -> value
    not_applied: dict[str, str]  # TENT's key -> why


def _same(field: str) -> Key:
    """TENT means by it what `engine.rdma.<field>` does."""
    return Key(_RDMA[field].type, lambda value: {f"engine.rdma.{field}": value})


def _lanes(value: int) -> dict[str, Any]:
    return {f"engine.rdma.{field}": value for field in _LANES}


KEYS = {
    "log_level": Key(
        Literal["debug", "info", "warning", "error"], lambda value: {"log_level": value}
    ),
    "rpc_server_hostname": Key(str, lambda text: {"engine.host": text} if text else {}),
    "topology/rdma_whitelist": _same("devices"),
    "topology/rdma_blacklist": _same("devices_excluded"),
    "topology/custom_json_path": _same("topology_file"),
    # The matrix itself: the setting takes a path or that.
    _MATRIX: Key(
        dict[str, tuple[tuple[str, ...], tuple[str, ...]]],
        lambda matrix: {"engine.rdma.topology_file": config_fields.show(matrix)},
    ),
    "transports/rdma/bind_address": _same("bind_address"),
    # TENT knows one number for its threads, its completion queues and its queue pairs.
    "transports/rdma/num_lanes": Key(_RDMA["num_workers"].type, _lanes),
    "transports/rdma/workers/num_workers": _same("num_workers"),
    "transports/rdma/device/num_cq_list": _same("num_cq"),
    "transports/rdma/endpoint/qp_mul_factor": _same("num_qp"),
    # For one slice there, too, whatever its name says (workers.cpp: slice_timeout_ns_).
    "transports/rdma/max_timeout_ns": Key(
        Annotated[int, Meta(ge=1, le=65_535_000_000_000)],
        lambda ns: {"engine.rdma.slice_timeout_s": ns / 1e9},
    ),
    "transports/rdma/pci_relaxed_ordering": _same("relaxed_ordering"),
    "transports/rdma/rail_error_threshold": _same("rail_error_threshold"),
    "transports/rdma/rail_error_window_secs": _same("rail_error_window_s"),
    "transports/rdma/rail_cooldown_secs": _same("rail_pause_s"),
    "transports/rdma/device/num_comp_channels": _same("num_comp_channels"),
    "transports/rdma/device/port": _same("port"),
    "transports/rdma/device/gid_index": _same("gid_index"),
    "transports/rdma/device/max_cqe": _same("max_cqe"),
    "transports/rdma/endpoint/endpoint_store_cap": _same("max_endpoints"),
    "transports/rdma/endpoint/max_sge": _same("max_sge"),
    "transports/rdma/endpoint/max_qp_wr": _same("max_wr"),
    "transports/rdma/endpoint/max_inline_bytes": _same("max_inline"),
    "transports/rdma/endpoint/path_mtu": _same("mtu"),
    **{
        f"transports/rdma/endpoint/{name}": _same(name)
        for name in (
            *("pkey_index", "hop_limit", "flow_label", "traffic_class", "service_level"),
            *("src_path_bits", "static_rate", "max_rd_atomic", "max_dest_rd_atomic"),
            *("min_rnr_timer", "send_timeout", "send_retry_count", "send_rnr_count"),
        )
    },
    "transports/rdma/workers/max_retry_count": _same("retry_count"),
    "transports/rdma/workers/block_size": _same("slice_bytes"),
    # How long a worker that ran out of work polls on before it sleeps.
    "transports/rdma/workers/grace_period_ns": Key(
        Annotated[int, Meta(ge=0, le=50_000_000)],
        lambda ns: {"engine.rdma.poll_us": ns / 1000},
    ),
    "transports/rdma/workers/rail_topo_path": _same("rail_topology_file"),
}

#: Keys that are judged together: which transports may be used.
_ENABLED = {  # scheme -> key, TENT's default
    "rdma": ("transports/rdma/enable", True),
    "tcp": ("transports/tcp/enable", True),
    "shm": ("transports/shm/enable", False),
}

#: Why -> keys that TENT knows and we do not apply; `*` at the end is a family, named as one.
NOT_APPLIED = {
    "TENT's choice among transports; here engine.protocol and engine.strict_transport decide": (
        *("policy", "qos", "use_legacy_transport_selection", "max_failover_attempts"),
        "enable_auto_failover_on_poll",
    ),
    "TENT's own queues and threads": (
        *("merge_requests", "enable_progress_worker", "enable_runtime_queue", "runtime_queue/*"),
        *("rpc_server_threads", "verbose"),
    ),
    "nodes name themselves, and each kind of port has a range: MC_MIN_RPC_PORT": (
        *("local_segment_name", "rpc_server_port"),
    ),
    "only metadata_type etcd has servers to ask": ("metadata_servers",),
    "metrics are the serving framework's: docs/metrics.md": ("metrics/*",),
    "rails are chosen by distance, measured pairs and health, not by learnt bandwidth": (
        *("transports/rdma/enable_smart_scheduling", "transports/rdma/bandwidth_learning_rate"),
        *("transports/rdma/default_bandwidth_gbps", "transports/rdma/min_bandwidth_gbps"),
        *("transports/rdma/max_bandwidth_gbps", "transports/rdma/ewma_*"),
        *("transports/rdma/numa_penalties", "transports/rdma/score_*"),
        *("transports/rdma/local_rotation_interval_us", "transports/rdma/deadline_bw_arbitration"),
        *("transports/rdma/slot_rotation_interval_ms", "transports/rdma/enable_priority_filtering"),
        *("transports/rdma/priority_promotion_*", "transports/rdma/log_slice_affinity"),
    ),
    "processes on one machine share a NIC as its hardware deals it out": (
        "transports/rdma/shared_quota_shm_path",
    ),
    "packet numbers are drawn anew for each connection": (
        *("transports/rdma/endpoint/rq_psn", "transports/rdma/endpoint/sq_psn"),
    ),
    "all queue pairs of an endpoint are of one class: traffic_class and service_level": (
        "transports/rdma/endpoint/qp_pools",
    ),
    "memory of a GPU goes by GPUDirect RDMA or not at all": (
        *("transports/rdma/disable_gpu_direct_rdma", "transports/rdma/gdr_*"),
    ),
    "this engine's tcp and shm have settings of their own: engine.tcp and engine.shm": (
        *("transports/tcp/max_retry_count", "transports/tcp/retry_base_delay_ms"),
        *("transports/tcp/retry_max_delay_ms", "transports/tcp/max_concurrent_tasks"),
        *("transports/shm/cxl_mount_path", "transports/shm/async_memcpy_threshold"),
    ),
    "transports that this engine does not have": (
        *("transports/gds/*", "transports/io_uring/*", "transports/mnnvl/*"),
        *("transports/nvlink/*", "transports/ub/*", "transports/ascend_direct/*"),
        *("transports/mpcomm/*", "transports/tpu/*", "transports/sunrise_link/*"),
    ),
}


def translate(tree: Mapping[str, object], source: str) -> Translation:
    """Split `tree` into today's settings and what is not applied.

    Raises:
        ConfigError: A key that TENT does not know either, a value out of range, or one that
            cannot be honoured.
    """
    flat: dict[str, Any] = {}
    _flatten(tree, "", source, flat)
    not_applied: dict[str, str] = {}
    settings = _protocol(flat, source, not_applied) | _metadata(flat, source)
    for name, value in flat.items():
        key = KEYS.get(name)
        if key is None:
            _note(name, value, source, not_applied)
            continue
        if name == _RETRY and value == 7:
            raise ConfigError(
                f"{source}: {name} is 7, which on some NICs (Soft-RoCE is one) means to retry for "
                "ever, so that a dead peer is never noticed; expected an integer from 0 to 6"
            )
        checked = config_fields.check(name, value, key.type, source)
        for setting, converted in key.settings(checked).items():
            if settings.get(setting, converted) != converted:
                raise ConfigError(
                    f"{source}: {name} is {value!r} but another key made {setting} "
                    f"{settings[setting]!r}; keep one"
                )
            settings[setting] = converted
    return Translation(settings, not_applied)


def _flatten(tree: Mapping[str, object], prefix: str, source: str, flat: dict[str, Any]) -> None:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name != _MATRIX:
            _flatten(value, f"{name}/", source, flat)
        else:
            config_fields.put(flat, name, value, source)


def _metadata(flat: dict[str, Any], source: str) -> dict[str, Any]:
    """Takes metadata_type out of `flat`, and metadata_servers where they are asked."""
    kind = config_fields.check(
        "metadata_type", flat.pop("metadata_type", ""), Literal["", "p2p", "etcd"], source
    )
    if kind == "etcd":
        servers = config_fields.check(
            "metadata_servers", flat.pop("metadata_servers", ""), str, source
        )
        return metadata_server(servers, f"{source}: metadata_servers")
    return {BACKEND: "p2p", ENDPOINTS: []} if kind else {}


def _protocol(flat: dict[str, Any], source: str, not_applied: dict[str, str]) -> dict[str, Any]:
    """Takes the keys out of `flat` that say which transports may be used."""
    given = {
        scheme: config_fields.check(key, flat.pop(key), bool, source)
        for scheme, (key, _) in _ENABLED.items()
        if key in flat
    }
    on = [scheme for scheme, (_, default) in _ENABLED.items() if given.get(scheme, default)]
    if {"rdma", "tcp"} <= {*on}:  # as engine.protocol says, which is auto unless it is set
        if given.get("shm") is False:
            not_applied[_ENABLED["shm"][0]] = (
                "engine.protocol auto uses it within a machine; engine.strict_transport with rdma "
                "or tcp does not"
            )
        return {}
    if len(on) == 1:
        return {"engine.protocol": on[0], "engine.strict_transport": True}
    raise ConfigError(
        f"{source}: of rdma, tcp and shm, transports/*/enable leaves {' and '.join(on) or 'none'}; "
        "one alone or all can be chosen: leave these keys out and set engine.protocol"
    )


def _note(name: str, value: object, source: str, not_applied: dict[str, str]) -> None:
    for why, patterns in NOT_APPLIED.items():
        for pattern in patterns:
            if fnmatch.fnmatchcase(name, pattern):
                if value not in (None, "", []):  # an empty value asks for nothing
                    not_applied[pattern] = why
                return
    known = [*KEYS, *(key for key, _ in _ENABLED.values()), "metadata_type"]
    known += [key for keys in NOT_APPLIED.values() for key in keys]
    hint = config_fields.nearest(name.replace("/", "."), [key.replace("/", ".") for key in known])
    raise ConfigError(f"{source}: unknown key {name!r}{hint.replace('.', '/')}")
