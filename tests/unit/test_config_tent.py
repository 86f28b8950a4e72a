from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from mooncake_engine.errors import ConfigError
from mooncake_engine.topology import load_matrix

from mooncake_connector import config_fields, config_tent
from mooncake_connector.config import FIELDS, ConnectorConfig, LoadedConfig, load_config

if TYPE_CHECKING:
    from pathlib import Path


def tent(tree: dict[str, Any], **environ: str) -> LoadedConfig:
    return load_config(environ={"MC_TENT_CONF": json.dumps(tree), **environ})


def nested(path: str, value: object) -> dict[str, Any]:
    """`{"a": {"b": value}}` for `a/b`."""
    tree: Any = value
    for key in reversed(path.split("/")):
        tree = {key: tree}
    return dict(tree)


def changed(loaded: LoadedConfig) -> dict[str, Any]:
    default = config_fields.values_of(ConnectorConfig())
    values = config_fields.values_of(loaded.config)
    return {name: value for name, value in values.items() if value != default[name]}


EXAMPLES: dict[str, tuple[Any, dict[str, Any]]] = {
    "log_level": ("error", {"log_level": "error"}),
    "rpc_server_hostname": ("10.0.0.1", {"engine.host": "10.0.0.1"}),
    "topology/rdma_whitelist": (["a", "b"], {"engine.rdma.devices": ("a", "b")}),
    "topology/rdma_blacklist": (["c"], {"engine.rdma.devices_excluded": ("c",)}),
    "topology/priority_matrix": (
        {"cpu:0": [["mlx5_0"], []]},
        {"engine.rdma.topology_file": '{"cpu:0":[["mlx5_0"],[]]}'},
    ),
    "topology/custom_json_path": ("/t.json", {"engine.rdma.topology_file": "/t.json"}),
    "transports/rdma/bind_address": ("10.1.0.1", {"engine.rdma.bind_address": "10.1.0.1"}),
    "transports/rdma/num_lanes": (
        6,
        {"engine.rdma.num_workers": 6, "engine.rdma.num_cq": 6, "engine.rdma.num_qp": 6},
    ),
    "transports/rdma/workers/num_workers": (6, {"engine.rdma.num_workers": 6}),
    "transports/rdma/device/num_cq_list": (6, {"engine.rdma.num_cq": 6}),
    "transports/rdma/endpoint/qp_mul_factor": (6, {"engine.rdma.num_qp": 6}),
    "transports/rdma/max_timeout_ns": (2_500_000_000, {"engine.rdma.slice_timeout_s": 2.5}),
    "transports/rdma/pci_relaxed_ordering": (0, {"engine.rdma.relaxed_ordering": 0}),
    "transports/rdma/rail_error_threshold": (3, {"engine.rdma.rail_error_threshold": 3}),
    "transports/rdma/rail_error_window_secs": (20, {"engine.rdma.rail_error_window_s": 20.0}),
    "transports/rdma/rail_cooldown_secs": (5, {"engine.rdma.rail_pause_s": 5.0}),
    "transports/rdma/device/num_comp_channels": (2, {"engine.rdma.num_comp_channels": 2}),
    "transports/rdma/device/port": (2, {"engine.rdma.port": 2}),
    "transports/rdma/device/gid_index": (3, {"engine.rdma.gid_index": 3}),
    "transports/rdma/device/max_cqe": (8192, {"engine.rdma.max_cqe": 8192}),
    "transports/rdma/endpoint/endpoint_store_cap": (256, {"engine.rdma.max_endpoints": 256}),
    "transports/rdma/endpoint/max_sge": (2, {"engine.rdma.max_sge": 2}),
    "transports/rdma/endpoint/max_qp_wr": (512, {"engine.rdma.max_wr": 512}),
    "transports/rdma/endpoint/max_inline_bytes": (0, {"engine.rdma.max_inline": 0}),
    "transports/rdma/endpoint/path_mtu": (1024, {"engine.rdma.mtu": 1024}),
    "transports/rdma/endpoint/pkey_index": (1, {"engine.rdma.pkey_index": 1}),
    "transports/rdma/endpoint/hop_limit": (16, {"engine.rdma.hop_limit": 16}),
    "transports/rdma/endpoint/flow_label": (7, {"engine.rdma.flow_label": 7}),
    "transports/rdma/endpoint/traffic_class": (106, {"engine.rdma.traffic_class": 106}),
    "transports/rdma/endpoint/service_level": (3, {"engine.rdma.service_level": 3}),
    "transports/rdma/endpoint/src_path_bits": (1, {"engine.rdma.src_path_bits": 1}),
    "transports/rdma/endpoint/static_rate": (5, {"engine.rdma.static_rate": 5}),
    "transports/rdma/endpoint/max_rd_atomic": (4, {"engine.rdma.max_rd_atomic": 4}),
    "transports/rdma/endpoint/max_dest_rd_atomic": (8, {"engine.rdma.max_dest_rd_atomic": 8}),
    "transports/rdma/endpoint/min_rnr_timer": (1, {"engine.rdma.min_rnr_timer": 1}),
    "transports/rdma/endpoint/send_timeout": (12, {"engine.rdma.send_timeout": 12}),
    "transports/rdma/endpoint/send_retry_count": (5, {"engine.rdma.send_retry_count": 5}),
    "transports/rdma/endpoint/send_rnr_count": (0, {"engine.rdma.send_rnr_count": 0}),
    "transports/rdma/workers/max_retry_count": (8, {"engine.rdma.retry_count": 8}),
    "transports/rdma/workers/block_size": (131072, {"engine.rdma.slice_bytes": 131072}),
    "transports/rdma/workers/grace_period_ns": (1500, {"engine.rdma.poll_us": 1.5}),
    "transports/rdma/workers/rail_topo_path": ("r", {"engine.rdma.rail_topology_file": "r"}),
}


def test_no_honoured_key_is_left_out_here() -> None:
    assert EXAMPLES.keys() == config_tent.KEYS.keys()


@pytest.mark.parametrize("path", EXAMPLES)
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "path"])
def test_a_key_changes_its_settings_and_nothing_else(path: str, flat: bool) -> None:
    value, settings = EXAMPLES[path]
    loaded = tent({path: value} if flat else nested(path, value))
    assert (changed(loaded), loaded.notices) == (settings, [])
    assert {loaded.origins[name] for name in settings} == {"MC_TENT_CONF"}


@pytest.mark.parametrize("path", EXAMPLES)
def test_a_value_that_cannot_be_is_refused_naming_the_key(path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tent(nested(path, {"an": "object"} if path == "log_level" else [[]]))
    assert path in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "right"),
    [
        ("transports/rdma/workers/grace_period_ns", 50_000_001, "an integer from 0 to 50000000"),
        ("transports/rdma/device/port", 0, "an integer from 1 to 255"),
        ("transports/rdma/device/port", "1", "an integer from 1 to 255"),
        ("transports/rdma/num_lanes", 0, "an integer from 1 to 64"),
        ("transports/rdma/endpoint/path_mtu", 1500, "one of 256, 512, 1024, 2048, 4096"),
        ("transports/rdma/endpoint/send_retry_count", 8, "an integer from 0 to 6"),
        ("metadata_type", "redis", "one of '', 'etcd', 'p2p'"),
        ("transports/rdma/enable", 1, "true or false"),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_range(
    path: str, value: object, right: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        tent(nested(path, value))
    assert str(caught.value) == f"{path} is {value!r} (MC_TENT_CONF); expected {right}"


def test_seven_send_retries_are_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match=r"send_retry_count is 7, which .* retry for ever"):
        tent(nested("transports/rdma/endpoint/send_retry_count", 7))


def test_the_deprecated_three_may_differ_but_not_from_num_lanes() -> None:
    rdma: dict[str, Any] = {
        "device": {"num_cq_list": 2},
        "endpoint": {"qp_mul_factor": 4},
        "workers": {"num_workers": 3},
    }
    loaded = tent({"transports": {"rdma": rdma}}).config.engine.rdma
    assert (loaded.num_cq, loaded.num_qp, loaded.num_workers) == (2, 4, 3)
    with pytest.raises(
        ConfigError, match=r"num_lanes is 2 but another key made engine\.rdma\.num_"
    ):
        tent({"transports": {"rdma": {**rdma, "num_lanes": 2}}})
    with pytest.raises(ConfigError, match=r"num_cq_list is 3 but .* engine\.rdma\.num_cq 2"):
        tent({"transports": {"rdma": {"num_lanes": 2, "device": {"num_cq_list": 3}}}})
    same = tent({"transports": {"rdma": {"num_lanes": 2, "device": {"num_cq_list": 2}}}})
    assert same.config.engine.rdma.num_qp == 2


@pytest.mark.parametrize(
    ("enabled", "engine"),
    [
        ({}, ("auto", False)),
        ({"rdma": True}, ("auto", False)),
        ({"rdma": True, "tcp": True, "shm": True}, ("auto", False)),
        ({"rdma": False}, ("tcp", True)),
        ({"tcp": False}, ("rdma", True)),
        ({"rdma": False, "tcp": False, "shm": True}, ("shm", True)),
    ],
)
def test_switching_transports_off_leaves_the_one_that_is_on(
    enabled: dict[str, bool], engine: tuple[str, bool]
) -> None:
    loaded = tent({"transports": {name: {"enable": on} for name, on in enabled.items()}})
    assert (loaded.config.engine.protocol, loaded.config.engine.strict_transport) == engine
    assert loaded.notices == []


@pytest.mark.parametrize(
    ("enabled", "left"),
    [
        ({"rdma": False, "shm": True}, "tcp and shm"),
        ({"rdma": False, "tcp": False}, "none"),
        ({"tcp": False, "shm": True}, "rdma and shm"),
    ],
)
def test_a_choice_that_cannot_be_kept_is_refused(enabled: dict[str, bool], left: str) -> None:
    with pytest.raises(ConfigError, match=rf"enable leaves {left}; .* set engine\.protocol"):
        tent({"transports": {name: {"enable": on} for name, on in enabled.items()}})


def test_shared_memory_switched_off_beside_the_others_is_said_not_to_be_applied() -> None:
    notices = tent({"transports": {"shm": {"enable": False}}}).notices
    assert len(notices) == 1
    assert notices[0].startswith("not applied: transports/shm/enable (engine.protocol auto uses")


def test_metadata_servers_are_asked_where_the_type_is_etcd() -> None:
    etcd = tent({"metadata_type": "etcd", "metadata_servers": "a:2379,b:2379"})
    assert etcd.config.engine.metadata.endpoints == ("a:2379", "b:2379")
    assert (etcd.config.engine.metadata.backend, etcd.notices) == ("etcd", [])
    p2p = tent({"metadata_type": "p2p", "metadata_servers": "a:2379"})
    assert p2p.config.engine.metadata.backend == "p2p"
    assert p2p.notices == [
        "not applied: metadata_servers (only metadata_type etcd has servers to ask)"
    ]
    with pytest.raises(ConfigError, match=r"metadata_servers is ''; use"):
        tent({"metadata_type": "etcd"})


def test_variables_win_over_tents_json_and_it_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mooncake.json"
    file.write_text(json.dumps({"engine": {"rdma": {"port": 2, "max_sge": 2, "max_wr": 32}}}))
    loaded = tent(
        {"transports": {"rdma": {"endpoint": {"max_sge": 3, "max_qp_wr": 64}}}},
        MOONCAKE_CONFIG_PATH=str(file),
        MC_MAX_WR="128",
    )
    rdma = loaded.config.engine.rdma
    assert (rdma.port, rdma.max_sge, rdma.max_wr) == (2, 3, 128)
    names = ("port", "max_sge", "max_wr")
    assert [loaded.origins[f"engine.rdma.{name}"] for name in names] == [
        str(file),
        "MC_TENT_CONF",
        "MC_MAX_WR",
    ]


def test_known_keys_that_are_not_applied_are_named_once_and_families_as_one() -> None:
    loaded = tent(
        {
            "local_segment_name": "",
            "rpc_server_port": 0,
            "metrics": {"enabled": True, "http_port": 9100},
            "policy": [{"name": "default"}],
            "transports": {"gds": {"enable": True}, "mnnvl": {"enable": False}},
        }
    )
    assert loaded.config == ConnectorConfig()
    assert [notice.partition(" (")[0] for notice in loaded.notices] == [
        "not applied: rpc_server_port",
        "not applied: metrics/*",
        "not applied: policy",
        "not applied: transports/gds/*, transports/mnnvl/*",
    ]


@pytest.mark.parametrize(
    ("path", "right"),
    [
        ("transports/rdma/device/prt", "transports/rdma/device/port"),
        ("transports/rdma/grace_period_ns", "transports/rdma/workers/grace_period_ns"),
        ("log_levl", "log_level"),
        ("transport/rdma/num_lanes", "transports/rdma/num_lanes"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_right_one(path: str, right: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tent(nested(path, 1))
    assert str(caught.value) == f"MC_TENT_CONF: unknown key {path!r}; did you mean {right!r}?"


def test_a_matrix_and_the_path_of_another_contradict_each_other() -> None:
    matrix = {"cpu:0": [["mlx5_0"], []]}
    with pytest.raises(ConfigError, match=r"custom_json_path is '/t\.json' but another key made"):
        tent({"topology": {"priority_matrix": matrix, "custom_json_path": "/t.json"}})


def test_a_matrix_in_the_json_is_read_by_the_engine() -> None:
    matrix = {"cpu:0": [["mlx5_0"], ["mlx5_1"]]}
    rdma = tent({"topology": {"priority_matrix": matrix}}).config.engine.rdma
    assert load_matrix(rdma.topology_file)["cpu:0"].available == ("mlx5_1",)


@pytest.mark.parametrize(
    ("conf", "message"),
    [
        ("{", "MC_TENT_CONF, line 1, column 2"),
        ('{"log_level": "info", "log_level": "error"}', "'log_level' is given twice"),
        ("/no/such/file.json", "cannot read the configuration file /no/such/file.json"),
    ],
)
def test_a_json_that_cannot_be_read_is_refused_saying_where(conf: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(environ={"MC_TENT_CONF": conf})
    assert message in str(caught.value)


def test_tents_json_in_place_of_the_file_is_refused_with_the_variable_for_it() -> None:
    with pytest.raises(ConfigError, match=r"'transports'; TENT's JSON is named by MC_TENT_CONF"):
        load_config(environ={}, extra={"transports": {}})


def test_every_setting_that_a_key_names_exists() -> None:
    for value, settings in EXAMPLES.values():
        assert settings.keys() <= FIELDS.keys(), value
