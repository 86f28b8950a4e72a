"""Large batches have a lane of their own, or share those of small ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from engines import SOON
from mooncake_engine import EngineConfig, Status
from mooncake_engine import bulk as bulk_module
from mooncake_engine.config import MetadataConfig, ShmConfig, TcpConfig
from mooncake_engine.engine import TransferEngine
from mooncake_engine.iovec import address_of
from native_loops import needs_native
from tcp_sides import until

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
SIZE = 8 * MIB


def engine(protocol: str = "tcp", **tcp: int) -> TransferEngine:
    return TransferEngine(
        EngineConfig(
            protocol=protocol,  # type: ignore[arg-type] - of a parametrized test
            strict_transport=True,
            host="127.0.0.1",
            metadata=MetadataConfig(p2p_min_port=0, p2p_max_port=0),
            tcp=TcpConfig(min_port=0, max_port=0, **tcp),
            shm=ShmConfig(threads=2),
        )
    )


class Pair:
    """Two engines and a large transfer between them."""

    def __init__(self, near: TransferEngine, far: TransferEngine) -> None:
        self.near, self.far = near, far
        self.here = np.zeros(SIZE, np.uint8)
        self.there = np.random.default_rng(4).integers(0, 256, SIZE, np.uint8)
        near.register_memory(self.here)
        far.register_memory(self.there)
        self.segment = near.open_segment(far.name)

    def rows(self, count: int) -> list[tuple[int, int, int]]:
        """All bytes, in runs that do not touch on both sides."""
        size = SIZE // count
        starts = range(0, SIZE, size)
        here, there = address_of(self.here), address_of(self.there)
        back = [(here + at, there + SIZE - size - at, size) for at in starts]
        return back if count > 1 else [(here, there, SIZE)]

    def wanted(self, count: int) -> np.ndarray:
        return self.there.reshape(count, -1)[::-1].reshape(-1)


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    needs_native()
    protocol, more = getattr(request, "param", ("tcp", {}))
    with engine(protocol) as near, engine(protocol, **more) as far:
        yield Pair(near, far)


both = pytest.mark.parametrize("pair", [("tcp", {}), ("shm", {})], indirect=True)
few_lanes = pytest.mark.parametrize("pair", [("tcp", {"max_served_lanes": 1})], indirect=True)


@both
@pytest.mark.parametrize("count", [1, 7 * 1024 + 1024, 4096 * 16])
@pytest.mark.parametrize("op", ["read", "write"])
def test_a_large_batch_arrives_exactly_however_many_runs_it_has(
    pair: Pair, op: str, count: int
) -> None:
    if op == "write":
        pair.here, pair.there = pair.there, pair.here
        rows = [(far, near, size) for near, far, size in pair.rows(count)]
    else:
        rows = pair.rows(count)
    end = pair.near.transfer(op, pair.segment, rows)
    assert end.ok, end.error
    assert np.array_equal(pair.here, pair.wanted(count))


@both
def test_a_small_batch_does_not_wait_for_large_ones(pair: Pair) -> None:
    large = [pair.near.submit("read", pair.segment, pair.rows(4)) for _ in range(20)]
    small = pair.near.transfer("read", pair.segment, [(*pair.rows(1)[0][:2], 100)])
    assert small.ok
    assert large[-1].poll() is None
    assert all(batch.wait(SOON).ok for batch in large)


@few_lanes
def test_where_the_peer_has_no_lane_left_a_large_batch_shares_those_of_small_ones(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        assert pair.near.transfer("read", pair.segment, pair.rows(2048)).ok
        assert np.array_equal(pair.here, pair.wanted(2048))
        pair.here[:] = 0
    said = [record.message for record in caplog.records if "share the lanes" in record.message]
    assert len(said) == 1
    assert "tcp.max_served_lanes" in said[0]
    assert sum(totals.batches for totals in pair.near.statistics().values()) == 2


@few_lanes
def test_a_large_batch_that_shares_lanes_ends_as_any_other(pair: Pair) -> None:
    assert pair.near.transfer("read", pair.segment, pair.rows(2)).ok
    late = pair.near.submit("read", pair.segment, pair.rows(2048), timeout=0.0001)
    assert late.wait(SOON).status is Status.TIMED_OUT
    cancelled = pair.near.submit("read", pair.segment, pair.rows(2048))
    cancelled.cancel()
    assert cancelled.wait(SOON).status in {Status.CANCELLED, Status.OK}
    refused = pair.near.submit("read", pair.segment, pair.rows(2), grant=b"nobody's")
    assert refused.wait(SOON).status is Status.REFUSED
    assert pair.near.transfer("read", pair.segment, pair.rows(2)).ok


def test_a_lane_of_its_own_is_taken_as_soon_as_there_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    needs_native()
    monkeypatch.setattr(bulk_module, "TRY_AGAIN_S", 0.0)
    with engine() as near, engine(max_served_lanes=2) as far:
        served = far.transports["tcp"]._server._served  # type: ignore[attr-defined] - a TcpTransport
        with engine() as other:
            other.open_segment(far.name)
            pair = Pair(near, far)
            assert pair.near.transfer("read", pair.segment, pair.rows(2)).ok
            assert len(served) == 2
        until(lambda: len(served) == 1, "the end of the other engine's lane")
        assert pair.near.transfer("read", pair.segment, pair.rows(2)).ok
        assert len(served) == 2
