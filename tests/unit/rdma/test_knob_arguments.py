"""From a variable, or a setting, to the exact argument that verbs get: no step loses it."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from mooncake_engine.transport.rdma.context import Context
from mooncake_engine.transport.rdma.endpoint import Endpoint
from mooncake_engine.transport.rdma.job import Job
from mooncake_engine.transport.rdma.messages import QueueAddress
from mooncake_engine.transport.rdma.rails import Rail
from mooncake_engine.transport.rdma.verbs.base import Opcode, Work
from verbs_stub import LIMITS, PORT, Provider, StubDevice, StubVerbs

from mooncake_connector.config import load_config

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mooncake_engine.transport.rdma.verbs.base import DeviceAttributes, PortAttributes


@contextlib.contextmanager
def opened(
    provider: Provider,
    environ: dict[str, str],
    settings: dict[str, Any] | None = None,
    *,
    limits: DeviceAttributes = LIMITS,
    port: PortAttributes = PORT,
    cpus: frozenset[int] | None = None,
) -> Iterator[Context]:
    """A NIC opened with what these variables, or settings of `engine.rdma`, say."""
    extra = {"engine": {"rdma": settings or {}}}
    config = load_config(environ=environ, extra=extra).config.engine.rdma
    device = StubDevice(provider, limits=limits, port=port)
    context = Context(StubVerbs(device), device.name, config, numa=-1, cpus=cpus)
    try:
        yield context
    finally:
        context.close()


def connected(provider: Provider, context: Context) -> None:
    """Take one queue pair from RESET to RTS, towards a NIC like ours."""
    queue_pair, _ = context.queue_pair()
    with contextlib.closing(queue_pair):
        context.to_init(queue_pair)
        context.connect(
            queue_pair, context.record, QueueAddress(7, 70), 80, mtu=context.mtu, reads=128
        )
    assert len(provider.of("to_rts")) == 1


def endpoint_of(context: Context) -> Endpoint:
    return Endpoint(
        context,
        Rail(0, 0),
        context.record,
        deadline=time.monotonic() + 60,
        on_state=lambda _endpoint, _state: None,
    )


PEER = {  # variable or field -> text or value, argument of RESET -> RTR
    "MC_GID_INDEX": ("1", "sgid_index", 1),
    "MC_IB_PORT": ("2", "port", 2),
    "MC_IB_TC": ("106", "traffic_class", 106),
    "MC_IB_SL": ("3", "service_level", 3),
    "MC_MTU": ("1024", "mtu", 1024),
    "hop_limit": (9, "hop_limit", 9),
    "flow_label": (0xABCDE, "flow_label", 0xABCDE),
    "src_path_bits": (5, "src_path_bits", 5),
    "static_rate": (4, "static_rate", 4),
    "max_dest_rd_atomic": (3, "max_dest_rd_atomic", 3),
    "min_rnr_timer": (1, "min_rnr_timer", 1),
}
LIMIT = {  # and of RTR -> RTS
    "max_rd_atomic": (3, "max_rd_atomic", 3),
    "send_timeout": (12, "timeout", 12),
    "send_retry_count": (2, "retry_count", 2),
    "send_rnr_count": (1, "rnr_retry", 1),
}
CAPS = {
    "MC_MAX_WR": ("33", "max_send_wr", 33),
    "MC_RDMA_MAX_WR_DEPTH": ("34", "max_send_wr", 34),
    "MC_MAX_SGE": ("7", "max_send_sge", 7),
    "MC_RDMA_MAX_SGE": ("1", "max_send_sge", 1),
    "MC_MAX_INLINE": ("128", "max_inline", 128),
}


def given(name: str, value: Any) -> tuple[dict[str, str], dict[str, Any]]:  # noqa: ANN401  # of any knob
    return ({name: value}, {}) if name.isupper() else ({}, {name: value})


@pytest.mark.parametrize("name", PEER)
def test_what_a_queue_pair_knows_of_its_path(name: str) -> None:
    provider = Provider()
    value, argument, wanted = PEER[name]
    with opened(provider, *given(name, value)) as context:
        connected(provider, context)
    assert getattr(provider.of("to_rtr")[0]["peer"], argument) == wanted


@pytest.mark.parametrize("name", LIMIT)
def test_how_long_and_how_often_a_queue_pair_tries(name: str) -> None:
    provider = Provider()
    value, argument, wanted = LIMIT[name]
    with opened(provider, *given(name, value)) as context:
        connected(provider, context)
    assert getattr(provider.of("to_rts")[0]["limits"], argument) == wanted


@pytest.mark.parametrize("name", CAPS)
def test_what_a_queue_pair_holds(name: str) -> None:
    provider = Provider()
    value, argument, wanted = CAPS[name]
    with opened(provider, *given(name, value)) as context:
        connected(provider, context)
    assert getattr(provider.of("queue_pair")[0]["caps"], argument) == wanted


def test_the_second_port_and_the_partition_reach_the_queue_pair_and_the_query() -> None:
    provider = Provider()
    with opened(provider, {"MC_IB_PORT": "2", "MC_PKEY_INDEX": "5"}) as context:
        connected(provider, context)
        assert context.record.port == 2
    init = provider.of("to_init")[0]
    assert (init["port"], init["pkey_index"]) == (2, 5)
    assert [call["number"] for call in provider.of("port")] == [2]


def test_unset_classes_are_zero_on_the_wire() -> None:
    provider = Provider()
    with opened(provider, {}) as context:
        connected(provider, context)
    peer = provider.of("to_rtr")[0]["peer"]
    assert (peer.traffic_class, peer.service_level, peer.hop_limit) == (0, 0, 64)


@pytest.mark.parametrize("count", [1, 3])
def test_completion_queues_are_as_many_and_as_deep_as_was_said(count: int) -> None:
    provider = Provider()
    environ = {"MC_NUM_CQ_PER_CTX": str(count), "MC_MAX_CQE_PER_CTX": "512"}
    with opened(provider, environ) as context:
        assert len(context.completions) == count
    depths = [call["depth"] for call in provider.of("completion_queue")]
    assert depths == [512] * (count + 1)  # one more receives


def test_completion_channels_are_as_many_as_was_said() -> None:
    counts = []
    for count in ("1", "4"):
        provider = Provider()
        with opened(provider, {"MC_NUM_COMP_CHANNELS_PER_CTX": count}):
            pass
        counts.append(len(provider.of("close_channel")))
    assert counts == [1, 4]


@pytest.mark.parametrize("name", ["MC_WORKERS_PER_CTX", "MC_NUM_CQ_POLL_THREADS"])
def test_threads_of_a_nic_are_as_many_as_was_said_and_on_the_cpus_near_it(name: str) -> None:
    near = min(os.sched_getaffinity(0))
    with opened(Provider(), {name: "3"}, cpus=frozenset({near})):
        threads = [t for t in threading.enumerate() if t.name.startswith("rdma-stub0-")]
        assert len(threads) == 3
        deadline = time.monotonic() + 10
        while any(os.sched_getaffinity(t.native_id or 0) != {near} for t in threads):
            assert time.monotonic() < deadline, "a thread runs elsewhere"
            time.sleep(0.001)  # until the threads have begun


@pytest.mark.parametrize("name", ["MC_NUM_QP_PER_EP", "MC_RDMA_QP_COUNT"])
def test_an_endpoint_has_as_many_queue_pairs_as_was_said(name: str) -> None:
    provider = Provider()
    with opened(provider, {name: "5"}) as context:
        endpoint = endpoint_of(context)
        asked = endpoint.request()
        endpoint.close()
    assert len(provider.of("queue_pair")) == len(asked.queues) == 5


def test_no_more_requests_are_under_way_on_a_nic_than_was_said() -> None:
    provider = Provider()
    with opened(provider, {"MC_ASYNC_TRANSFER_LIMIT": "6", "MC_NUM_CQ_PER_CTX": "2"}) as context:
        endpoint = endpoint_of(context)
        taken = [_post(endpoint, 10) for _ in range(4)]
        endpoint.close()
    assert taken == [3, 3, 0, 0]  # each completion queue has its half, and nobody polls


@pytest.mark.parametrize(
    ("settings", "limits", "wanted"),
    [
        ({"max_wr": 9000, "max_cqe": 9000}, {"max_qp_wr": 100}, {"max_send_wr": 100}),
        ({"max_sge": 64}, {"max_sge": 16}, {"max_send_sge": 16}),
    ],
)
def test_what_a_nic_cannot_do_is_lowered_to_what_it_can(
    settings: dict[str, int], limits: dict[str, int], wanted: dict[str, int]
) -> None:
    provider = Provider()
    with opened(provider, {}, settings, limits=LIMITS._replace(**limits)) as context:
        connected(provider, context)
    caps = provider.of("queue_pair")[0]["caps"]
    assert {name: getattr(caps, name) for name in wanted} == wanted


def test_the_smaller_of_the_setting_and_the_ports_mtu_counts() -> None:
    with opened(Provider(), {"MC_MTU": "4096"}, port=PORT._replace(active_mtu=2048)) as context:
        assert context.mtu == 2048


def test_reads_are_as_many_as_both_the_initiator_and_the_target_can() -> None:
    provider = Provider()
    weak = LIMITS._replace(max_qp_init_rd_atom=4, max_qp_rd_atom=2)
    with opened(provider, {}, {"max_rd_atomic": 8, "max_dest_rd_atomic": 8}, limits=weak) as nic:
        connected(provider, nic)
        assert nic.record.max_dest_rd_atomic == 2
    assert provider.of("to_rts")[0]["limits"].max_rd_atomic == 4
    assert provider.of("to_rtr")[0]["peer"].max_dest_rd_atomic == 2


def _post(endpoint: Endpoint, count: int) -> int:
    """Post WRITEs of one byte; how many were taken."""
    job = Job()
    job.begin(np.ones(count, np.uint64))
    rows = np.arange(count, dtype=np.int64)
    work = Work(
        rows.astype(np.uint64),
        rows,
        np.ones(count, np.int64),
        rows.astype(np.uint64),
        np.ones(count, np.uint32),
    )
    keys = np.zeros(count, np.uint32)
    return endpoint.post(job, Opcode.WRITE, work, slice(0, count), keys, keys, 0)
