"""Each variable of the rdma transport reaches its field, or is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mooncake_engine import RdmaConfig
from mooncake_engine.errors import ConfigError

from mooncake_connector import config_fields, env_table
from mooncake_connector.config import FIELDS, load_config


def rdma(environ: dict[str, str]) -> dict[str, Any]:
    """The fields of engine.rdma that these variables change."""
    default = config_fields.values_of(RdmaConfig())
    loaded = config_fields.values_of(load_config(environ=environ).config.engine.rdma)
    return {name: value for name, value in loaded.items() if value != default[name]}


#: variable -> field, lowest and highest accepted value.
NUMBERS = {
    "MC_IB_PORT": ("port", 1, 255),
    "MC_GID_INDEX": ("gid_index", -1, 255),
    "NCCL_IB_GID_INDEX": ("gid_index", -1, 255),
    "MC_PKEY_INDEX": ("pkey_index", 0, 65535),
    "MC_NUM_CQ_PER_CTX": ("num_cq", 1, 255),
    "MC_NUM_COMP_CHANNELS_PER_CTX": ("num_comp_channels", 1, 255),
    "MC_MAX_CQE_PER_CTX": ("max_cqe", 2, 65535),
    "MC_WORKERS_PER_CTX": ("num_workers", 1, 8),
    "MC_NUM_CQ_POLL_THREADS": ("num_workers", 1, 8),
    "MC_ASYNC_TRANSFER_LIMIT": ("max_outstanding", 1, 1 << 20),
    "MC_NUM_QP_PER_EP": ("num_qp", 1, 255),
    "MC_RDMA_QP_COUNT": ("num_qp", 1, 255),
    "MC_MAX_WR": ("max_wr", 1, 65535),
    "MC_RDMA_MAX_WR_DEPTH": ("max_wr", 1, 65535),
    "MC_MAX_BATCH_SIZE": ("max_chain", 1, 65535),
    "MC_MAX_SGE": ("max_sge", 1, 65535),
    "MC_RDMA_MAX_SGE": ("max_sge", 1, 65535),
    "MC_MAX_INLINE": ("max_inline", 0, 65535),
    "MC_IB_TC": ("traffic_class", -1, 255),
    "MC_IB_SL": ("service_level", -1, 15),
    "MC_MAX_EP_PER_CTX": ("max_endpoints", 1, 65536),
    "MC_SLICE_SIZE": ("slice_bytes", 4096, 1 << 30),
    "MC_FRAGMENT_RATIO": ("fragment_ratio", 1, 65536),
    "MC_RETRY_CNT": ("retry_count", 1, 127),
    "MC_SLICE_TIMEOUT": ("slice_timeout_s", -1, 65535),
    "MC_RDMA_RAIL_PAUSE_SECONDS": ("rail_pause_s", 1, 3599),
    "MC_IB_PCI_RELAXED_ORDERING": ("relaxed_ordering", 0, 2),
    "MC_MAX_MR_SIZE": ("max_mr_bytes", 4096, 1 << 62),
    "MC_ENABLE_PARALLEL_REG_MR": ("parallel_registration", -1, 1),
    "MC_MAX_CONCURRENT_REG_MR": ("max_concurrent_registrations", 0, 1024),
}
SWITCHES = {
    "MC_PATH_ROUNDROBIN": "path_round_robin",
    "MC_ENABLE_DEST_DEVICE_AFFINITY": "dest_device_affinity",
    "WITH_NVIDIA_PEERMEM": "nvidia_peermem",
}
OTHERS = (
    ({"MC_VERBS_BINDING": "pyverbs"}, {"binding": "pyverbs"}),
    ({"MC_RDMA_BIND_ADDRESS": "10.1.0.7"}, {"bind_address": "10.1.0.7"}),
    ({"MOONCAKE_DEVICE": "mlx5_0, mlx5_2,"}, {"devices": ("mlx5_0", "mlx5_2")}),
    ({"MOONCAKE_DEVICE": "auto-discovery"}, {}),
    ({"MC_TE_FILTERS": "mlx5_1"}, {"devices": ("mlx5_1",)}),
    ({"MOONCAKE_DEVICE": "mlx5_0", "MC_TE_FILTERS": "mlx5_1"}, {"devices": ("mlx5_1",)}),
    ({"MC_TE_FILTERS_EXCLUDE": "mlx5_3"}, {"devices_excluded": ("mlx5_3",)}),
    ({"MC_CUSTOM_TOPO_JSON": "/etc/nics.json"}, {"topology_file": "/etc/nics.json"}),
    ({"MC_MTU": "1024"}, {"mtu": 1024}),
    ({"MC_ENDPOINT_STORE_TYPE": "FIFO"}, {"endpoint_store": "FIFO"}),
    (
        {"MC_MIN_RPC_PORT": "20000", "MC_MAX_RPC_PORT": "20100"},
        {"min_port": 20000, "max_port": 20100},
    ),
    # a name of Mooncake's own wins over its alias, and its index over NCCL's
    ({"MC_MAX_WR": "512", "MC_RDMA_MAX_WR_DEPTH": "128"}, {"max_wr": 512}),
    ({"MC_MAX_SGE": "8", "MC_RDMA_MAX_SGE": "1"}, {"max_sge": 8}),
    ({"MC_NUM_QP_PER_EP": "8", "MC_RDMA_QP_COUNT": "4"}, {"num_qp": 8}),
    ({"MC_WORKERS_PER_CTX": "4", "MC_NUM_CQ_POLL_THREADS": "3"}, {"num_workers": 4}),
    ({"MC_GID_INDEX": "1", "NCCL_IB_GID_INDEX": "3"}, {"gid_index": 1}),
)


def test_no_variable_of_the_transport_is_left_out_here() -> None:
    tested = {*NUMBERS, *SWITCHES, *(name for environ, _ in OTHERS for name in environ)}
    assert tested >= {variable.name for variable in env_table.RDMA}


# So that the largest send queue and the smallest completion queue fit together.
ROOM = {
    "MC_MAX_WR": {"MC_MAX_CQE_PER_CTX": "65535"},
    "MC_RDMA_MAX_WR_DEPTH": {"MC_MAX_CQE_PER_CTX": "65535"},
    "MC_MAX_CQE_PER_CTX": {"MC_MAX_WR": "1"},
}


def check_number(name: str, value: int) -> None:
    """In range it lands in its field as it stands; out of range it is refused by its name."""
    field, low, high = NUMBERS[name]
    environ = {**ROOM.get(name, {}), name: str(value)}
    if low <= value <= high:
        loaded = load_config(environ=environ)
        assert getattr(loaded.config.engine.rdma, field) == value
        assert loaded.origins[f"engine.rdma.{field}"] == name
    else:
        with pytest.raises(
            ConfigError, match=rf"^{name} is '?{value}'? \(environment\); expected "
        ):
            load_config(environ=environ)


@pytest.mark.parametrize("name", NUMBERS)
def test_the_ends_of_a_range_are_accepted_and_what_lies_beyond_is_refused(name: str) -> None:
    _, low, high = NUMBERS[name]
    for value in (low - 1, low, high, high + 1):
        check_number(name, value)


@settings(deadline=None, derandomize=True)
@given(name=st.sampled_from(sorted(NUMBERS)), value=st.integers(-(1 << 65), 1 << 65))
def test_any_number_lands_in_its_field_or_is_refused(name: str, value: int) -> None:
    check_number(name, value)


@pytest.mark.parametrize("name", NUMBERS)
def test_a_text_that_only_begins_like_a_number_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} is '4k' \(environment\); expected "):
        load_config(environ={name: "4k"})


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_is_on_or_off_and_nothing_else(name: str) -> None:
    assert rdma({name: "1"}) == {SWITCHES[name]: True}
    assert rdma({name: "ON"}) == {SWITCHES[name]: True}
    assert rdma({name: "0"}) == {}
    with pytest.raises(ConfigError, match=rf"{name} is 'perhaps' .*; expected true or false"):
        rdma({name: "perhaps"})


@pytest.mark.parametrize(("environ", "fields"), OTHERS)
def test_other_variables_land_in_their_fields(
    environ: dict[str, str], fields: dict[str, Any]
) -> None:
    assert rdma(environ) == fields


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (
            {"MC_MTU": "1500"},
            "MC_MTU is '1500' (environment); expected one of 512, 1024, 2048, 4096",
        ),
        ({"MC_ENDPOINT_STORE_TYPE": "LRU"}, "expected one of 'FIFO', 'SIEVE'"),
        ({"MC_VERBS_BINDING": "rdma-core"}, "expected one of 'native', 'pyverbs'"),
        (
            {"MC_MAX_WR": "8192"},
            "engine.rdma.max_wr (MC_MAX_WR) is 8192 but engine.rdma.max_cqe "
            "(MC_MAX_CQE_PER_CTX) is 4096",
        ),
        (
            {"MC_TE_FILTERS": "a,b", "MC_TE_FILTERS_EXCLUDE": "b"},
            "engine.rdma.devices and engine.rdma.devices_excluded both name b",
        ),
        ({"MC_FORCE_TCP": "1", "MC_FORCE_HCA": "1"}, "MC_FORCE_TCP and MC_FORCE_HCA are both on"),
    ],
)
def test_what_contradicts_itself_or_is_not_in_the_list_is_refused(
    environ: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(environ=environ)
    assert message in str(caught.value)


def test_nccls_gid_index_counts_only_where_no_source_of_ours_says_one() -> None:
    tent = {"MC_TENT_CONF": '{"transports/rdma/device/gid_index": 0}'}
    assert rdma({"NCCL_IB_GID_INDEX": "3"}) == {"gid_index": 3}
    assert rdma({"NCCL_IB_GID_INDEX": "3", **tent}) == {"gid_index": 0}
    assert rdma({"NCCL_IB_GID_INDEX": "3", **tent, "MC_GID_INDEX": "1"}) == {"gid_index": 1}


def test_a_send_queue_shorter_than_the_longest_post_is_fine() -> None:
    assert rdma({"MC_MAX_WR": "64"}) == {"max_wr": 64}


def test_the_ports_of_the_control_socket_are_a_range() -> None:
    with pytest.raises(ConfigError, match=r"engine\.rdma\.min_port is 9000 and .* is 8000"):
        load_config(environ={}, extra={"engine.rdma": {"min_port": 9000, "max_port": 8000}})


def test_forcing_the_nic_means_rdma_and_nothing_else() -> None:
    engine = load_config(environ={"MC_FORCE_HCA": "1"}).config.engine
    assert (engine.protocol, engine.strict_transport) == ("rdma", True)


@pytest.mark.parametrize(
    "name",
    [
        *("MC_AUTO_GID_MAX_RETRIES", "MC_HANDSHAKE_PORT", "MC_HANDSHAKE_LISTEN_BACKLOG"),
        *("MC_HANDSHAKE_MAX_LENGTH", "MC_MLX5_QP_UDP_SPORTS", "MC_MLX5_QP_LAG_PORT_BALANCE"),
        *("MC_ENABLE_HCA_PEER_AFFINITY", "MC_NIC_PEER_AFFINITY", "MC_CONN_PAUSE_TTL_MS"),
        *("MC_LOG_RDMA_SLICE_AFFINITY", "MC_TRACK_RDMA_POSTED_SLICES", "MC_MIN_REG_SIZE"),
        *("MC_DISABLE_GPU_DIRECT_RDMA", "MC_USE_TENT", "MC_TENT_RPC_THREADS"),
    ],
)
def test_a_variable_of_mooncakes_rdma_that_is_not_applied_is_named_with_a_reason(name: str) -> None:
    notices = load_config(environ={name: "1"}).notices
    assert len(notices) == 1
    assert notices[0].startswith(f"not applied: {name} (")


def test_the_old_files_device_name_chooses_devices() -> None:
    config = load_config(environ={}, extra={"device_name": "mlx5_0,mlx5_1"}).config
    assert config.engine.rdma.devices == ("mlx5_0", "mlx5_1")


def test_every_field_can_be_set_in_the_file() -> None:
    changes: dict[str, Any] = {
        "binding": "pyverbs",
        "devices": ["mlx5_0"],
        "hop_limit": 1,
        "poll_us": 2.5,
        "send_retry_count": 3,
        "rail_error_threshold": 2,
        "rail_topology_file": "rails.json",
    }
    loaded = load_config(environ={}, extra={"engine": {"rdma": changes}})
    assert {name: getattr(loaded.config.engine.rdma, name) for name in changes} == {
        **changes,
        "devices": ("mlx5_0",),
    }
    assert {f"engine.rdma.{name}" for name in RdmaConfig.__struct_fields__} <= FIELDS.keys()


def test_seven_retries_are_refused_in_the_file_too() -> None:
    with pytest.raises(ConfigError, match=r"engine\.rdma\.send_retry_count is 7 .* from 0 to 6"):
        load_config(environ={}, extra={"engine.rdma.send_retry_count": 7})
