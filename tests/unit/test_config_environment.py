from __future__ import annotations

import fnmatch

import pytest
from mooncake_engine.errors import ConfigError

from mooncake_connector import config_fields, env_table
from mooncake_connector.config import ConnectorConfig, load_config


def changed(environ: dict[str, str]) -> dict[str, object]:
    """The settings that these variables change."""
    default = config_fields.values_of(ConnectorConfig())
    loaded = config_fields.values_of(load_config(environ=environ).config)
    return {name: value for name, value in loaded.items() if value != default[name]}


@pytest.mark.parametrize(
    ("environ", "settings"),
    [
        ({"MC_FORCE_TCP": "1"}, {"engine.protocol": "tcp", "engine.strict_transport": True}),
        ({"MC_FORCE_TCP": "off"}, {}),
        ({"MC_TRANSFER_TIMEOUT": "5"}, {"engine.transfer_timeout_s": 5.0}),
        ({"MC_HANDSHAKE_CONNECT_TIMEOUT": "7"}, {"engine.connect_timeout_s": 7.0}),
        ({"MC_METADATA_CLUSTER_ID": "blue"}, {"engine.metadata.cluster": "blue"}),
        ({"MC_LOG_LEVEL": "WARNING"}, {"log_level": "warning"}),
        ({"MC_LOG_LEVEL": "trace"}, {"log_level": "debug"}),
        (
            {"MC_MIN_RPC_PORT": "16000", "MC_MAX_RPC_PORT": "16100"},
            {
                "engine.tcp.min_port": 16000,
                "engine.tcp.max_port": 16100,
                "engine.rdma.min_port": 16000,
                "engine.rdma.max_port": 16100,
                "engine.metadata.p2p_min_port": 16000,
                "engine.metadata.p2p_max_port": 16100,
            },
        ),
        ({"MC_TCP_BIND_ADDRESS": "10.0.0.1"}, {"engine.tcp.bind_address": "10.0.0.1"}),
        ({"MC_TCP_SLICE_SIZE": " 65536 "}, {"engine.tcp.slice_bytes": 65536}),
        ({"MC_TCP_LANES_PER_PEER": "2"}, {"engine.tcp.lanes_per_peer": 2}),
        ({"MC_TCP_MAX_CONNECTIONS_PER_PEER": "1"}, {"engine.tcp.lanes_per_peer": 1}),
        (
            {"MC_TCP_MAX_CONNECTIONS_PER_PEER": "1", "MC_TCP_LANES_PER_PEER": "2"},
            {"engine.tcp.lanes_per_peer": 2},
        ),
        ({"MOONCAKE_PROTOCOL": "rdma"}, {"engine.protocol": "rdma"}),
        ({"MOONCAKE_LOCAL_HOSTNAME": "10.0.0.1:12345"}, {"engine.host": "10.0.0.1"}),
        (
            {"MOONCAKE_TE_META_DATA_SERVER": "etcd://a:2379,b:2379"},
            {
                "engine.metadata.backend": "etcd",
                "engine.metadata.endpoints": ("a:2379", "b:2379"),
            },
        ),
        ({"MOONCAKE_TE_META_DATA_SERVER": "P2PHANDSHAKE"}, {}),
        ({"MC_FORCE_TCP": "", "MC_TRANSFER_TIMEOUT": " "}, {}),
        ({"PATH": "/bin", "MCX": "1", "mc_force_tcp": "1"}, {}),
    ],
)
def test_a_variable_changes_what_it_names_and_nothing_else(
    environ: dict[str, str], settings: dict[str, object]
) -> None:
    assert changed(environ) == settings


@pytest.mark.parametrize(
    ("name", "text", "right"),
    [
        ("MC_FORCE_TCP", "maybe", "true or false"),
        ("MC_TRANSFER_TIMEOUT", "4", "an integer from 5 to 86400"),
        ("MC_TRANSFER_TIMEOUT", "30s", "an integer from 5 to 86400"),
        ("MC_MIN_RPC_PORT", "0", "an integer from 1 to 65535"),
        ("MC_MAX_RPC_PORT", "65536", "an integer from 1 to 65535"),
        ("MC_TCP_SLICE_SIZE", "4k", "an integer from 4096 to 1073741824"),
        ("MC_TCP_SLICE_SIZE", "4095", "an integer from 4096 to 1073741824"),
        ("MC_TCP_LANES_PER_PEER", "65", "an integer from 1 to 64"),
        ("MC_METADATA_CLUSTER_ID", "a/b", "a string like ^[A-Za-z0-9_.-]+$"),
        ("MC_LOG_LEVEL", "LOUD", "one of 'debug', 'error', 'info', 'trace', 'warning'"),
    ],
)
def test_a_value_out_of_range_is_refused_not_rounded(name: str, text: str, right: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(environ={name: text})
    shown = text if text.isdigit() else repr(text)
    assert str(caught.value) == f"{name} is {shown} (environment); expected {right}"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("MOONCAKE_PROTOCOL", "efa", "MOONCAKE_PROTOCOL is 'efa'; expected one of 'tcp', 'rdma'"),
        ("MOONCAKE_TE_META_DATA_SERVER", "redis://h", "redis metadata is not supported; use"),
        ("MOONCAKE_TE_META_DATA_SERVER", "http://h/metadata", "http metadata is not supported"),
    ],
)
def test_what_is_not_supported_is_refused_naming_what_is(
    name: str, text: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(environ={name: text})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("MC_FORCE_TPC", "MC_FORCE_TCP"),
        ("MC_TRANSFER_TIMEOUTS", "MC_TRANSFER_TIMEOUT"),
        ("MC_GID_INDX", "MC_GID_INDEX"),
        ("MOONCAKE_PROTOCOLS", "MOONCAKE_PROTOCOL"),
        ("MOONCAKE_CONFIG_PAHT", "MOONCAKE_CONFIG_PATH"),
    ],
)
def test_a_misspelt_variable_is_refused_with_the_right_name(name: str, right: str) -> None:
    with pytest.raises(ConfigError, match=rf"^unknown .* {name}; did you mean '{right}'\?$"):
        load_config(environ={name: "1"})


def test_a_variable_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown environment variable MC_XYZZY; unset it"):
        load_config(environ={"MC_XYZZY": "1"})


def test_known_variables_of_other_parts_are_named_once_each_group_in_a_line() -> None:
    loaded = load_config(
        environ={
            "MC_MLX5_QP_UDP_SPORTS": "1",
            "MC_MLX5_QP_LAG_PORT_BALANCE": "1",
            "MC_STORE_MEMCPY": "1",
            "MOONCAKE_MASTER": "h:50051",
            "MOONCAKE_SOMETHING_NEW": "1",
        }
    )
    assert loaded.config == ConnectorConfig()
    assert loaded.notices == [
        "not applied: MC_MLX5_QP_LAG_PORT_BALANCE, MC_MLX5_QP_UDP_SPORTS "
        "(it needs the verbs of one vendor, and only those that all NICs have are used)",
        "not applied: MC_STORE_MEMCPY, MOONCAKE_MASTER, MOONCAKE_SOMETHING_NEW "
        "(another part of Mooncake, such as its store)",
    ]


def test_the_old_misspelling_of_the_ports_is_applied_and_said() -> None:
    loaded = load_config(environ={"MC_MIN_PRC_PORT": "16000"})
    assert loaded.config.engine.tcp.min_port == 16000
    assert loaded.notices == [
        "MC_MIN_PRC_PORT is applied; it is an old misspelling of MC_MIN_RPC_PORT"
    ]


def test_variables_of_other_programs_with_the_same_prefix_are_left_alone() -> None:
    loaded = load_config(environ={"MC_SID": "4711", "MC_HOST_minio": "https://key@play"})
    assert (loaded.config, loaded.notices) == (ConnectorConfig(), [])


def test_no_variable_is_both_honoured_and_not_applied() -> None:
    honoured = [variable.name for variable in env_table.VARIABLES]
    patterns = [pattern for group in env_table.NOT_APPLIED.values() for pattern in group]
    assert len(set(honoured)) == len(honoured)
    assert len(set(patterns)) == len(patterns)
    assert not [
        name for name in honoured for pattern in patterns if fnmatch.fnmatchcase(name, pattern)
    ]
