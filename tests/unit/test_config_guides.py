"""What tuning guides for Mooncake tell users to paste is understood here."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from mooncake_connector import config_fields
from mooncake_connector.config import ConnectorConfig, LoadedConfig, load_config

GUIDES = Path(__file__).parents[1] / "data" / "guides"


def exported(name: str) -> dict[str, str]:
    """What bash makes of the block's exports. Its other lines set up a machine: not run."""
    lines = (GUIDES / f"{name}.sh").read_text().splitlines()
    script = "\n".join([line for line in lines if line.startswith("export ")] + ["env -0"])
    done = subprocess.run(
        ["bash", "-euc", script], env={"PATH": "/usr/bin:/bin"}, capture_output=True, check=True
    )
    pairs = (part.partition("=") for part in done.stdout.decode().split("\0") if part)
    return {key: value for key, _, value in pairs if key.startswith("MC_")}


def changed(loaded: LoadedConfig) -> dict[str, Any]:
    """The settings that differ from the defaults; `rdma.` for `engine.rdma.`."""
    default = config_fields.values_of(ConnectorConfig())
    values = config_fields.values_of(loaded.config)
    assert {name for name in values if values[name] != default[name]} <= {
        name for name, origin in loaded.origins.items() if origin != "default"
    }
    return {
        name.removeprefix("engine."): value
        for name, value in values.items()
        if value != default[name]
    }


BLOCKS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "benchmark": (
        {
            "rdma.max_chain": 128,
            "rdma.max_outstanding": 1000,
            "rdma.max_wr": 128,
            "rdma.max_sge": 1,
            "rdma.num_qp": 4,
        },
        [
            "MC_NUM_CQ_POLL_THREADS is applied; "
            "Mooncake itself knows it as MC_WORKERS_PER_CTX only",
            "MC_ASYNC_TRANSFER_LIMIT is applied; Mooncake itself does not know it; here it limits "
            "the work requests under way on one NIC",
            "MC_RDMA_QP_COUNT is applied; Mooncake itself knows it as MC_NUM_QP_PER_EP only",
            "MC_RDMA_MAX_WR_DEPTH is applied; Mooncake itself knows it as MC_MAX_WR only",
            "MC_MAX_BATCH_SIZE is applied; Mooncake itself does not know it; here it limits "
            "the work requests posted at once",
            "MC_RDMA_MAX_SGE is applied; Mooncake itself knows it as MC_MAX_SGE only",
        ],
    ),
    "traffic_class": ({"rdma.traffic_class": 106}, []),
    "destination_affinity": ({"rdma.dest_device_affinity": True}, []),
    "infiniband": (
        {
            "rdma.gid_index": 0,
            "rdma.slice_bytes": 131072,
            "rdma.num_workers": 4,
            "rdma.path_round_robin": True,
        },
        [],
    ),
    "roce_v2": ({"rdma.gid_index": 3, "rdma.traffic_class": 106}, []),
    "high_throughput": (
        {
            "rdma.slice_bytes": 131072,
            "rdma.num_workers": 4,
            "rdma.max_wr": 512,
            "rdma.max_cqe": 8192,
            "rdma.dest_device_affinity": True,
            "rdma.path_round_robin": True,
            "log_level": "warning",
        },
        [
            "not applied: MC_STORE_MEMCPY, MC_STORE_USE_HUGEPAGE "
            "(another part of Mooncake, such as its store)",
            "not applied: MC_TE_METRIC (Mooncake's own engine, which is not used here)",
        ],
    ),
    "low_latency": (
        {"rdma.retry_count": 5, "log_level": "warning"},
        [
            "not applied: MC_STORE_USE_HUGEPAGE (another part of Mooncake, such as its store)",
        ],
    ),
    "tcp": (
        {"tcp.bind_address": "192.168.1.100"},
        [
            "MC_MIN_PRC_PORT is applied; it is an old misspelling of MC_MIN_RPC_PORT",
            "MC_MAX_PRC_PORT is applied; it is an old misspelling of MC_MAX_RPC_PORT",
        ],
    ),
    "huge_pages": (
        {},
        [
            "not applied: MC_STORE_HUGEPAGE_SIZE, MC_STORE_USE_HUGEPAGE "
            "(another part of Mooncake, such as its store)",
        ],
    ),
    "cxl": (
        {},
        [
            "not applied: MC_CXL_DEV_PATH, MC_CXL_DEV_SIZE "
            "(transports that this engine does not have)",
        ],
    ),
}


@pytest.mark.parametrize("name", [path.stem for path in sorted(GUIDES.glob("*.sh"))])
def test_a_guides_shell_block_sets_what_it_names_and_says_what_it_does_not(name: str) -> None:
    loaded = load_config(environ=exported(name))
    assert (changed(loaded), loaded.notices) == BLOCKS[name]


def test_every_export_of_a_block_is_seen_though_its_value_is_the_default() -> None:
    origins = set(load_config(environ=exported("infiniband")).origins.values())
    assert origins == {"default", *exported("infiniband")}


TENT: dict[str, tuple[dict[str, Any], list[str]]] = {
    "lanes": ({"rdma.num_cq": 8, "rdma.num_qp": 8, "rdma.num_workers": 8}, []),
    "rail_topology": ({"rdma.rail_topology_file": "/opt/mooncake/rail_topo.json"}, []),
    "shared_quota": (
        {},
        [
            "not applied: transports/rdma/shared_quota_shm_path "
            "(processes on one machine share a NIC as its hardware deals it out)",
        ],
    ),
    "shm": (
        {},
        [
            "not applied: transports/shm/async_memcpy_threshold "
            "(this engine's tcp and shm have settings of their own: engine.tcp and engine.shm)",
        ],
    ),
    "high_performance": (
        {
            "log_level": "warning",
            "rdma.slice_timeout_s": 5.0,
            "rdma.num_cq": 8,
            "rdma.gid_index": 0,
            "rdma.max_cqe": 8192,
            "rdma.num_qp": 8,
            "rdma.max_wr": 512,
            "rdma.num_workers": 8,
            "rdma.retry_count": 8,
            "rdma.slice_bytes": 131072,
            "rdma.poll_us": 1000.0,
            "rdma.rail_topology_file": "/opt/mooncake/rail_topo.json",
        },
        [
            "not applied: transports/rdma/shared_quota_shm_path "
            "(processes on one machine share a NIC as its hardware deals it out)",
        ],
    ),
}


@pytest.mark.parametrize("name", [path.stem for path in sorted(GUIDES.glob("*.json"))])
@pytest.mark.parametrize("inline", [False, True], ids=["file", "inline"])
def test_a_guides_tent_json_is_loaded_from_a_file_and_inline(name: str, inline: bool) -> None:
    path = GUIDES / f"{name}.json"
    loaded = load_config(environ={"MC_TENT_CONF": path.read_text() if inline else str(path)})
    assert (changed(loaded), loaded.notices) == TENT[name.removeprefix("tent_")]
    source = "MC_TENT_CONF" if inline else str(path)
    assert set(loaded.origins.values()) <= {"default", source}
