from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from mooncake_engine.errors import ConfigError

import mooncake_connector
from mooncake_connector import config_fields, env_table
from mooncake_connector.config import FIELDS, ConnectorConfig, LoadedConfig, load_config

REPOSITORY = Path(__file__).parents[2]
PACKAGED = Path(mooncake_connector.__file__).parent / "data" / "mooncake.json"


def from_file(tmp_path: Path, content: object) -> LoadedConfig:
    file = tmp_path / "mooncake.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return load_config(str(file), environ={})


def from_extra(extra: dict[str, object]) -> LoadedConfig:
    return load_config(environ={}, extra=extra)


def test_the_packaged_file_names_every_setting_at_its_default() -> None:
    tree = json.loads(PACKAGED.read_text())
    flat = config_fields.flatten(tree, FIELDS, "mooncake.json")
    assert flat.keys() == FIELDS.keys()
    assert msgspec.convert(tree, ConnectorConfig) == ConnectorConfig()
    assert load_config(str(PACKAGED), environ={}).config == ConnectorConfig()


def test_the_file_in_configs_is_the_packaged_one_and_every_setting_is_documented() -> None:
    assert (REPOSITORY / "configs" / "mooncake.json").read_text() == PACKAGED.read_text()
    pages = ("configuration.md", "rdma.md")
    documented = "".join((REPOSITORY / "docs" / page).read_text() for page in pages)
    # The page of the rdma transport has a table of its own, and a test of its own.
    fields = [name.removeprefix("engine.rdma.") for name in FIELDS]
    names = [*fields, *(variable.name for variable in env_table.VARIABLES)]
    assert [name for name in names if f"`{name}`" not in documented] == []


def test_a_password_is_not_shown_by_repr() -> None:
    secret = {"engine.metadata.username": "u", "engine.metadata.password": "hunter2"}
    shown = repr(from_extra(secret))
    assert "password='***'" in shown
    assert "hunter2" not in shown


def test_without_any_source_every_setting_is_at_its_default() -> None:
    loaded = load_config(environ={})
    assert loaded.config == ConnectorConfig()
    assert set(loaded.origins.values()) == {"default"}
    assert loaded.origins.keys() == FIELDS.keys()
    assert loaded.notices == []


def test_later_sources_win_and_the_origin_of_each_value_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "mooncake.json"
    file.write_text('{"engine": {"tcp": {"lanes_per_peer": 2, "slice_bytes": 65536}}}')
    loaded = load_config(
        environ={
            "MOONCAKE_CONFIG_PATH": str(file),
            "MC_TCP_LANES_PER_PEER": "3",
            "MC_TRANSFER_TIMEOUT": "60",
        },
        extra={"engine": {"transfer_timeout_s": 90}, "engine.shm.threads": 6},
    )
    engine = loaded.config.engine
    assert (engine.tcp.slice_bytes, loaded.origins["engine.tcp.slice_bytes"]) == (65536, str(file))
    assert engine.tcp.lanes_per_peer == 3
    assert loaded.origins["engine.tcp.lanes_per_peer"] == "MC_TCP_LANES_PER_PEER"
    assert engine.transfer_timeout_s == 90.0
    assert loaded.origins["engine.transfer_timeout_s"] == "kv_connector_extra_config"
    assert engine.shm.threads == 6
    assert loaded.origins["engine.protocol"] == "default"


def test_a_path_given_by_hand_wins_over_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "mooncake.json"
    file.write_text('{"control_port": 7000}')
    environ = {"MOONCAKE_CONFIG_PATH": str(tmp_path / "missing.json")}
    assert load_config(str(file), environ=environ).config.control_port == 7000


@pytest.mark.parametrize(
    ("extra", "right"),
    [
        ({"engin": {}}, "'engine'"),
        ({"engine": {"protocl": "tcp"}}, "engine.protocol"),
        ({"engine": {"tcp": {"lane_per_peer": 2}}}, "engine.tcp.lanes_per_peer"),
        ({"engine.tcp.lane_per_peer": 2}, "engine.tcp.lanes_per_peer"),
        ({"lanes_per_peer": 2}, "engine.tcp.lanes_per_peer"),
        ({"heartbeat_interval": 2}, "heartbeat_interval_s"),
        ({"metadata_servers": "P2PHANDSHAKE"}, "metadata_server"),
    ],
)
def test_an_unknown_setting_is_refused_with_the_nearest_right_name(
    extra: dict[str, object], right: str
) -> None:
    with pytest.raises(ConfigError, match=r"kv_connector_extra_config: unknown setting") as caught:
        from_extra(extra)
    assert right in str(caught.value)


def test_a_setting_like_no_other_is_refused_without_a_guess() -> None:
    with pytest.raises(ConfigError, match=r"unknown setting 'xyzzy'$"):
        from_extra({"xyzzy": 1})


@pytest.mark.parametrize(
    ("name", "value", "right"),
    [
        ("engine.tcp.lanes_per_peer", 0, "an integer from 1 to 64"),
        ("engine.tcp.lanes_per_peer", 4.5, "an integer from 1 to 64"),
        ("engine.tcp.lanes_per_peer", "4", "an integer from 1 to 64"),
        ("engine.tcp.lanes_per_peer", True, "an integer from 1 to 64"),
        ("engine.tcp.lanes_per_peer", None, "an integer from 1 to 64"),
        ("engine.transfer_timeout_s", 0, "a number from more than 0 to 86400"),
        ("engine.transfer_timeout_s", float("inf"), "a number from more than 0 to 86400"),
        ("engine.transfer_timeout_s", float("nan"), "a number from more than 0 to 86400"),
        ("engine.protocol", "nvlink", "one of 'auto', 'loopback', 'rdma', 'shm', 'tcp'"),
        ("engine.strict_transport", 1, "true or false"),
        ("engine.host", 5, "a string"),
        ("engine.metadata.endpoints", "h:2379", "a list of strings"),
        ("engine.metadata.cluster", "a/b", "a string like ^[A-Za-z0-9_.-]+$"),
        ("bootstrap_port", 65536, "an integer from 0 to 65535"),
    ],
)
def test_a_wrong_value_is_refused_naming_setting_value_source_and_what_is_right(
    name: str, value: object, right: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        from_extra({name: value})
    expected = f"{name} is {value!r} (kv_connector_extra_config); expected {right}"
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"engine": 5}, "engine is 5; expected an object of settings"),
        (
            {"engine.tcp.min_port": 9000, "engine.tcp.max_port": 8000},
            "engine.tcp.min_port is 9000 and engine.tcp.max_port is 8000",
        ),
        ({"engine.tcp.min_port": 0}, "0 in both for any port"),
        ({"engine.metadata.p2p_min_port": 0}, "engine.metadata.p2p_min_port is 0"),
        ({"heartbeat_interval_s": 10}, "heartbeat_interval_s is 10 but peer_dead_after_s is 10"),
        ({"engine.metadata.backend": "etcd"}, "endpoints is empty; name at least one"),
        ({"engine.metadata.endpoints": ["h:2379"]}, "set the backend to 'etcd'"),
        ({"engine.metadata.client_cert": "c.pem"}, "client_cert and client_key go together"),
        ({"engine.metadata.username": "u"}, "username and password go together"),
        (
            {"engine.metadata.client_cert": "c.pem", "engine.metadata.client_key": "k.pem"},
            "client_cert is set but ca_cert is empty",
        ),
        ({"engine.host": "0.0.0.0"}, "which no peer can connect to"),
        ({"engine.host": "::"}, "which no peer can connect to"),
        (
            {"engine": {"shm": {"threads": 2}}, "engine.shm.threads": 3},
            "engine.shm.threads is given twice, as 2 and as 3; keep one",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    extra: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        from_extra(extra)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{\n  "control_port": 1, // ours\n}',
            "line 2, column 22: Expecting property name enclosed in double quotes; "
            "JSON has no comments, remove them",
        ),
        ('{"control_port": 1,\n\n "x" 5}', "line 3, column 6: Expecting ':' delimiter"),
        ('{"control_port": 1, "control_port": 2}', "'control_port' is given twice; keep one"),
        ('{"control_port": NaN}', "NaN is not a JSON number"),
        ("[1]", "holds [1]; expected one object of settings"),
        ("", "line 1, column 1"),
    ],
)
def test_a_file_that_is_no_usable_json_is_refused_saying_where(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        from_file(tmp_path, text)
    assert str(tmp_path / "mooncake.json") in str(caught.value)
    assert message in str(caught.value)


def test_a_file_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mooncake.json"
    file.write_bytes(b'{"engine.host": "\xff"}')
    with pytest.raises(ConfigError, match=r"mooncake\.json is not UTF-8 \(byte 17\)"):
        load_config(str(file), environ={})


def test_a_missing_file_names_the_command_that_writes_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"No such file.*config init"):
        load_config(str(tmp_path / "missing.json"), environ={})


def test_importing_the_packages_and_the_command_line_loads_no_framework() -> None:
    code = (
        "import sys, mooncake_connector.cli, mooncake_engine\n"
        "print(sorted({'torch', 'vllm', 'sglang', 'grpc', 'aiohttp'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout == "[]\n"
