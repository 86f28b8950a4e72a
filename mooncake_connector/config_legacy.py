"""The old Mooncake form of mooncake.json, told in today's settings. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from mooncake_engine.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

BACKEND = "engine.metadata.backend"
ENDPOINTS = "engine.metadata.endpoints"
_SUPPORTED = 'use "etcd://host:2379", "host:2379" or "P2PHANDSHAKE"'
_PROTOCOLS = ("tcp", "rdma", "shm", "auto")

#: Old names that say nothing here -> why. Each is named once when it is met.
NOT_APPLIED = {
    **dict.fromkeys(
        ("prefill_url", "decode_url"), "peers are found by the metadata store or by the request"
    ),
    **dict.fromkeys(
        (
            "master_server_address",
            "global_segment_size",
            "local_buffer_size",
            "enable_ssd_offload",
            "ssd_offload_path",
            "enable_offload",
            "tenant_id",
            "enable_client_http_server",
            "client_http_port",
            "mode",
        ),
        "it belongs to the Mooncake store",
    ),
    **dict.fromkeys(
        ("num_workers", "bootstrap_server_address", "prefill_side_swa_replay"),
        "it belongs to vLLM's own MooncakeConnector",
    ),
}
_TRANSLATED = (
    "metadata_server",
    "metadata_backend",
    "protocol",
    "mooncake_protocol",
    "local_hostname",
    "device_name",
)
NAMES = (*_TRANSLATED, *NOT_APPLIED)


class Translation(NamedTuple):
    """An old-form mapping, taken apart."""

    rest: dict[str, object]  # what is not old form
    settings: dict[str, Any]  # dotted name -> value
    not_applied: dict[str, str]  # old name -> why


def translate(tree: Mapping[str, object], source: str) -> Translation:
    """Split `tree` into today's settings and the old ones, translated.

    Raises:
        ConfigError: An old setting that cannot be honoured (redis, http).
    """
    old = {key: tree[key] for key in _TRANSLATED if key in tree}
    for key, value in old.items():
        if not isinstance(value, str):
            raise ConfigError(f"{source}: {key} is {value!r}; expected a string")
    texts = {key: str(value).strip() for key, value in old.items()}
    settings = _metadata(
        texts.get("metadata_server", ""), texts.get("metadata_backend", ""), source
    )
    for key in ("protocol", "mooncake_protocol"):
        if texts.get(key):
            settings |= protocol(texts[key], f"{source}: {key}")
    if texts.get("local_hostname"):
        settings |= local_hostname(texts["local_hostname"])
    # Empty in every tcp example: then it asks for nothing.
    if texts.get("device_name"):
        settings |= device_name(texts["device_name"])
    rest = {key: value for key, value in tree.items() if key not in NAMES}
    # An empty value asks for nothing.
    unused = {key: why for key, why in NOT_APPLIED.items() if tree.get(key) not in (None, "")}
    return Translation(rest, settings, unused)


def metadata_server(text: str, where: str) -> dict[str, Any]:
    """`P2PHANDSHAKE`, `etcd://a:2379,b:2379` or `a:2379` as settings."""
    if text.upper() == "P2PHANDSHAKE":
        return {BACKEND: "p2p", ENDPOINTS: []}
    scheme, found, rest = text.partition("://")
    if found and scheme.lower() != "etcd":
        raise ConfigError(f"{where} is {text!r}: {scheme} metadata is not supported; {_SUPPORTED}")
    endpoints = [part.strip().rstrip("/") for part in (rest if found else text).split(",")]
    if not all(endpoints) or any("/" in endpoint for endpoint in endpoints):
        raise ConfigError(f"{where} is {text!r}; {_SUPPORTED}")
    return {BACKEND: "etcd", ENDPOINTS: endpoints}


def protocol(text: str, where: str) -> dict[str, Any]:
    """A transport's name as a setting."""
    if text.lower() not in _PROTOCOLS:
        raise ConfigError(
            f"{where} is {text!r}; expected one of {', '.join(repr(p) for p in _PROTOCOLS)}"
        )
    return {"engine.protocol": text.lower()}


def local_hostname(text: str) -> dict[str, Any]:
    """`host`, `host:port` or `[v6]:port`: the port was the old handshake's and is dropped."""
    host, colon, port = text.rpartition(":")
    if colon and port.isdigit() and (":" not in host or host.startswith("[")):
        text = host
    return {"engine.host": text.strip("[]")}


def device_name(text: str, field: str = "devices") -> dict[str, Any]:
    """`mlx5_0,mlx5_1`, or `auto-discovery` for all."""
    names = [] if text == "auto-discovery" else [part.strip() for part in text.split(",")]
    return {f"engine.rdma.{field}": [name for name in names if name]}


def _metadata(server: str, backend: str, source: str) -> dict[str, Any]:
    settings = metadata_server(server, f"{source}: metadata_server") if server else {}
    if not backend:
        return settings
    wanted = "p2p" if backend.upper() == "P2PHANDSHAKE" else backend.lower()
    if wanted not in ("etcd", "p2p"):
        raise ConfigError(
            f"{source}: metadata_backend is {backend!r}, which is not supported; {_SUPPORTED} "
            "as metadata_server"
        )
    if settings and settings[BACKEND] != wanted:
        raise ConfigError(
            f"{source}: metadata_backend is {backend!r} but metadata_server is {server!r}; "
            "remove metadata_backend"
        )
    return settings | {BACKEND: wanted}
