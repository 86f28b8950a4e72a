"""The connector's settings, and the one place that reads the file and the environment.

Sources, later wins: defaults < file < TENT's JSON (`MC_TENT_CONF`) < other variables <
`kv_connector_extra_config`.
"""

from __future__ import annotations

import difflib
import fnmatch
import os
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from mooncake_engine.config import EngineConfig, Port, Seconds
from mooncake_engine.errors import ConfigError

from mooncake_connector import (
    config_checks,
    config_fields,
    config_file,
    config_legacy,
    config_tent,
    env_table,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

EXTRA = "kv_connector_extra_config"


class ConnectorConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything the connector can be told; `engine` is what it tells the engine."""

    engine: EngineConfig = EngineConfig()
    heartbeat_interval_s: Seconds = 2.0  # from a thread of the node, never from engine steps
    peer_dead_after_s: Seconds = 10.0  # silence after which a peer is dead
    request_timeout_s: Seconds = 300.0  # one request's total, from which every wait draws
    # A hold that no decode server asked for: the client or the router went away in between.
    unclaimed_hold_s: Seconds = 60.0
    # A router's params can reach decode before prefill's worker has heard of the request.
    unknown_transfer_grace_s: Seconds = 30.0
    control_port: Port = 0  # of rank 0 on `engine.host`, rank r listens r above it; 0: any
    max_message_bytes: Annotated[int, msgspec.Meta(ge=4096, le=1 << 30)] = 16 << 20
    http_url: str = ""  # of this server's API, published so that the proxy finds it
    bootstrap_port: Port = 0  # prefill: serve `GET /query` for vllm-router's mooncake mode; 0: off
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    # Let a request force a transport and slow its reads down: for this project's own tests.
    testing: bool = False


class LoadedConfig(msgspec.Struct, frozen=True):
    """The effective settings and where they came from.

    Attributes:
        config: What to use.
        origins: Dotted name of every setting -> "default", the file's path, the variable's name,
            or "kv_connector_extra_config".
        notices: One line for each group of known names that are not applied here.
    """

    config: ConnectorConfig
    origins: dict[str, str]
    notices: list[str]


FIELDS = config_fields.fields_of(ConnectorConfig)


def load_config(
    path: str | None = None,
    environ: Mapping[str, str] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> LoadedConfig:
    """Read, check and merge all sources.

    Args:
        path: mooncake.json; default: what `MOONCAKE_CONFIG_PATH` names, else no file.
        environ: Default: this process's environment.
        extra: vLLM's `kv_connector_extra_config`; nested as in the file, or dotted names.

    Raises:
        ConfigError: One sentence naming the setting, its value, its source and what is right.
    """
    environ = os.environ if environ is None else environ
    values = {name: field.default for name, field in FIELDS.items()}
    origins = dict.fromkeys(FIELDS, "default")
    unused: dict[str, list[str]] = {}
    path = path or environ.get(env_table.CONFIG_PATH)
    if path:
        remedy = "; `mooncake-connector config init` writes one with every default"
        _apply_tree(config_file.read(path, remedy), path, values, origins, unused)
    tent = environ.get(env_table.TENT_CONF, "").strip()
    if tent:
        _apply_tent(tent, values, origins, unused)
    remarks = _apply_environment(environ, values, origins, unused)
    _apply_tree(extra or {}, EXTRA, values, origins, unused)
    config = config_fields.build(ConnectorConfig, values)
    config_checks.check_together(config)
    notices = [f"not applied: {', '.join(names)} ({why})" for why, names in unused.items()]
    return LoadedConfig(config, origins, remarks + notices)


def _apply_tree(
    tree: Mapping[str, Any],
    source: str,
    values: dict[str, Any],
    origins: dict[str, str],
    unused: dict[str, list[str]],
) -> None:
    old = config_legacy.translate(tree, source)
    known = [*FIELDS, *config_legacy.NAMES]
    for name in old.rest:
        if "." not in name and not any(field.split(".")[0] == name for field in FIELDS):
            hint = config_fields.nearest(name, known)
            if name == "transports":
                hint = f"; TENT's JSON is named by {env_table.TENT_CONF}"
            raise ConfigError(f"{source}: unknown setting {name!r}{hint}")
    flat = config_fields.flatten(old.rest, FIELDS, source)
    for name, value in old.settings.items():
        config_fields.put(flat, name, value, source)
    for name, value in flat.items():
        values[name] = config_fields.check(name, value, FIELDS[name].type, source)
        origins[name] = source
    for name, why in old.not_applied.items():
        unused.setdefault(why, []).append(name)


def _apply_tent(
    conf: str, values: dict[str, Any], origins: dict[str, str], unused: dict[str, list[str]]
) -> None:
    inline = conf.startswith("{")
    source = env_table.TENT_CONF if inline else conf
    tree = config_file.parse(conf, source) if inline else config_file.read(conf)
    tent = config_tent.translate(tree, source)
    for name, value in tent.settings.items():
        values[name] = config_fields.check(name, value, FIELDS[name].type, source)
        origins[name] = source
    for name, why in tent.not_applied.items():
        unused.setdefault(why, []).append(name)


def _apply_environment(
    environ: Mapping[str, str],
    values: dict[str, Any],
    origins: dict[str, str],
    unused: dict[str, list[str]],
) -> list[str]:
    # An empty variable is an unset one: that is how shells and manifests take one back.
    texts = {name: text for name, text in environ.items() if text.strip()}
    remarks = []
    seen: dict[str, Any] = {}
    for variable in env_table.VARIABLES:
        if (text := texts.get(variable.name)) is None:
            continue
        value = config_fields.check_text(variable.name, text, variable.type, "environment")
        seen[variable.name] = value
        for name, setting in variable.settings(value).items():
            if variable.fallback and origins[name] != "default":
                continue
            values[name] = config_fields.check(name, setting, FIELDS[name].type, variable.name)
            origins[name] = variable.name
        if variable.remark:
            remarks.append(f"{variable.name} is applied; {variable.remark}")
    for first, second in env_table.OPPOSITES:
        if seen.get(first) and seen.get(second):
            raise ConfigError(f"{first} and {second} are both on; unset one")
    for name in sorted(texts):
        why = _why_unused(name)
        if why:
            unused.setdefault(why, []).append(name)
    return remarks


_HONOURED = {
    env_table.CONFIG_PATH,
    env_table.TENT_CONF,
    *(variable.name for variable in env_table.VARIABLES),
}


def _why_unused(name: str) -> str:
    """Why a variable is not applied; empty when it is, or when it is not ours to judge.

    Raises:
        ConfigError: It has our prefix and nobody knows it.
    """
    prefix = next((p for p in env_table.PREFIXES if name.startswith(p)), "")
    if not prefix or name in _HONOURED or _matches(name, env_table.FOREIGN):
        return ""
    for why, patterns in env_table.NOT_APPLIED.items():
        if _matches(name, patterns):
            return why
    known = _HONOURED.union(*env_table.NOT_APPLIED.values())
    # Without the prefix, which would make every two names look alike.
    ends = {k.removeprefix(prefix): k for k in sorted(known) if k.startswith(prefix)}
    hint = difflib.get_close_matches(name.removeprefix(prefix), ends, 1, 0.75)
    if prefix == "MOONCAKE_" and not hint:
        return env_table.STORE  # many programs of that project read a variable of this prefix
    remedy = f"did you mean {ends[hint[0]]!r}?" if hint else "unset it"
    raise ConfigError(f"unknown environment variable {name}; {remedy}")


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
