from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
from mooncake_engine import EngineConfig, MetadataConfig, PathUnavailable, Status, TransferEngine
from mooncake_engine.errors import LaneError
from mooncake_engine.topology import Machine, Nic, NicPair, Node
from mooncake_engine.transport.loopback import LoopbackLane, LoopbackLink, LoopbackTransport
from typing_extensions import override

from mooncake_connector.topology_measure import measure

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mooncake_engine.transport.base import Lane, Link
    from mooncake_engine.types import SegmentRecord, Slice

CONFIG = EngineConfig(
    protocol="loopback", strict_transport=True, metadata=MetadataConfig(backend="memory")
)
MACHINE = Machine((Nic("a", numa=0), Nic("b", numa=0)), (), (Node(0, frozenset({0}), {0: 10}),))


def pair(ours: str, theirs: str) -> NicPair:
    return NicPair(ours, theirs, remote_numa=1)


class RailedTransport(LoopbackTransport):
    """Loopback whose link pretends that each byte goes by one pair of NICs, some of them slow."""

    delays: dict[NicPair, float | None]  # None: the pair moves nothing
    link: RailedLink

    @override
    def connect(self, peer: SegmentRecord) -> Link:
        self.link = RailedLink(self._here[peer.incarnation], self.delays)
        return self.link


class RailedLink(LoopbackLink):
    def __init__(self, target: LoopbackTransport, delays: dict[NicPair, float | None]) -> None:
        super().__init__(target)
        self.delays = delays
        self.only: NicPair | None = None

    def nic_pairs(self) -> list[NicPair]:
        return list(self.delays)

    def restrict(self, pair: NicPair | None) -> None:
        self.only = pair

    @override
    def open_lane(self) -> Lane:
        return RailedLane(self._target, self)


class RailedLane(LoopbackLane):
    def __init__(self, target: LoopbackTransport, link: RailedLink) -> None:
        super().__init__(target)
        self._link = link

    @override
    def move(self, piece: Slice, deadline: float) -> None:
        assert self._link.only, "measured without saying which pair"
        delay = self._link.delays[self._link.only]
        if delay is None:
            raise LaneError(Status.FAILED, "no route by this pair")
        time.sleep(delay)  # what makes a pair slow
        super().move(piece, deadline)


@pytest.fixture
def peer() -> Iterator[TransferEngine]:
    with TransferEngine(CONFIG, name="peer-1-0a") as engine:
        yield engine


@pytest.fixture
def ours() -> Iterator[TransferEngine]:
    with TransferEngine(CONFIG, name="here-2-0b") as engine:
        before = engine.transports["loopback"]
        railed = RailedTransport(CONFIG, before.regions, before.grants, engine.incarnation)
        engine.transports["loopback"] = railed
        yield engine
        railed.close()


def railed(engine: TransferEngine, delays: dict[NicPair, float | None]) -> RailedTransport:
    transport = engine.transports["loopback"]
    assert isinstance(transport, RailedTransport)
    transport.delays = delays
    return transport


def test_the_fast_pairs_are_matched(ours: TransferEngine, peer: TransferEngine) -> None:
    fast, slow = 0.0, 0.15  # so far apart that a busy machine does not turn them round
    delays = {
        pair("a", "x"): slow,
        pair("a", "y"): fast,
        pair("b", "x"): fast,
        pair("b", "y"): slow,
    }
    transport = railed(ours, dict(delays))
    memory = peer.allocate(2 << 20)
    memory[:] = 7
    lines: list[str] = []
    segment = ours.open_segment(peer.record())
    record = measure(ours, segment, MACHINE, seconds=0.05, report=lines.append)
    assert (record.src_host, record.dst_host) == ("here", "peer")
    assert [(p.src_dev, p.dst_dev) for p in record.partition_matchings["0-1"]] == [
        ("a", "y"),
        ("b", "x"),
    ]
    by_pair = {(p.src_dev, p.dst_dev): p for p in record.endpoints}
    assert len(by_pair) == len(lines) == 4
    assert by_pair["a", "x"].latency > 150_000 > by_pair["a", "y"].latency > 0
    assert by_pair["a", "y"].bandwidth > by_pair["a", "x"].bandwidth > 0
    assert transport.link.only is None
    assert np.all(memory == 7)
    assert ours.record().regions == ()


def test_a_pair_that_moves_nothing_is_left_out_and_named(
    ours: TransferEngine, peer: TransferEngine
) -> None:
    railed(ours, {pair("a", "x"): None, pair("b", "x"): 0.0})
    peer.allocate(4096)
    lines: list[str] = []
    segment = ours.open_segment(peer.record())
    record = measure(ours, segment, MACHINE, seconds=0.05, report=lines.append)
    assert [(p.src_dev, p.dst_dev) for p in record.endpoints] == [("b", "x")]
    assert lines[0].startswith("a -> x  left out: ")
    assert "no route by this pair" in lines[0]


def test_no_pair_that_works_is_an_error(ours: TransferEngine, peer: TransferEngine) -> None:
    transport = railed(ours, {pair("a", "x"): None})
    peer.allocate(4096)
    with pytest.raises(PathUnavailable, match="no pair of NICs moves bytes"):
        measure(ours, ours.open_segment(peer.record()), MACHINE)
    assert transport.link.only is None
    assert ours.record().regions == ()


def test_a_peer_without_memory_cannot_be_measured(
    ours: TransferEngine, peer: TransferEngine
) -> None:
    railed(ours, {pair("a", "x"): 0.0})
    with pytest.raises(PathUnavailable, match="peer-1-0a has registered no memory"):
        measure(ours, ours.open_segment(peer.record()), MACHINE)


def test_a_transport_without_rails_cannot_be_measured(peer: TransferEngine) -> None:
    with (
        TransferEngine(CONFIG) as plain,
        pytest.raises(PathUnavailable, match="over loopback, which has no pairs of NICs"),
    ):
        measure(plain, plain.open_segment(peer.record()), MACHINE)
