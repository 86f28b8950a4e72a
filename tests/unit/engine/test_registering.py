"""What transports hear of memory that is registered and taken back."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
from engines import SOON, address, config
from mooncake_engine import (
    InvalidTransfer,
    MetadataConfig,
    MetadataError,
    PathUnavailable,
    TransferEngine,
)
from mooncake_engine.device import pages
from mooncake_engine.metadata.memory import MemoryStore
from mooncake_engine.testing.faults import Faults, FaultyTransport, install
from mooncake_engine.transport.base import Capabilities
from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mooncake_engine import Region
    from mooncake_engine.transport.base import Transport


class Pinning(FaultyTransport):
    """A transport that has to be told of memory, as a NIC has; it may refuse, or take its time."""

    def __init__(self, inner: Transport) -> None:
        super().__init__(inner, Faults())
        self.told: list[tuple[str, Region]] = []
        self.refuses = ""
        self.entered, self.gate = threading.Event(), threading.Event()
        self.gate.set()

    @override
    def register(self, region: Region) -> None:
        self._tell("register", region)

    @override
    def unregister(self, region: Region) -> None:
        self._tell("unregister", region)

    def _tell(self, what: str, region: Region) -> None:
        self.told.append((what, region))
        self.entered.set()
        assert self.gate.wait(SOON)
        if what == self.refuses:
            raise PathUnavailable(f"the NIC cannot {what} it")

    @property
    def verbs(self) -> list[str]:
        return [what for what, _ in self.told]


@pytest.fixture
def store() -> Iterator[MemoryStore]:
    store = MemoryStore(MetadataConfig(backend="memory"))
    yield store
    store.close()


@pytest.fixture
def engine(store: MemoryStore) -> Iterator[TransferEngine]:
    """With two transports, so that one can be left registered when the other refuses."""
    with TransferEngine(config("tcp", strict_transport=False), name="pins", store=store) as made:
        for scheme in ("tcp", "shm"):
            made.transports[scheme] = Pinning(made.transports[scheme])
        yield made


def _pinning(engine: TransferEngine, scheme: str = "tcp") -> Pinning:
    transport = engine.transports[scheme]
    assert isinstance(transport, Pinning)
    return transport


def _published(engine: TransferEngine) -> list[int]:
    return [region.address for region in engine.record().regions]


def test_each_transport_hears_of_a_region_and_of_its_pages(engine: TransferEngine) -> None:
    memory = pages(1 << 16)
    region = engine.register_memory(memory, page_bytes=4096)
    for scheme in ("tcp", "shm"):
        assert _pinning(engine, scheme).told == [("register", region)]
    assert (region.address, region.page_bytes) == (address(memory), 4096)


def test_each_transport_hears_when_a_region_is_taken_back(engine: TransferEngine) -> None:
    region = engine.register_memory(pages(1 << 16))
    engine.unregister_memory(region.address)
    for scheme in ("tcp", "shm"):
        assert _pinning(engine, scheme).told == [("register", region), ("unregister", region)]
        assert _pinning(engine, scheme).told[1][1] is region


def test_a_transport_that_refuses_leaves_the_region_registered_nowhere(
    engine: TransferEngine,
) -> None:
    # Who may put other pages under a region comes first.
    first, second = _pinning(engine, "shm"), _pinning(engine, "tcp")
    second.refuses = "register"
    memory = pages(1 << 16)
    with pytest.raises(PathUnavailable, match="cannot register"):
        engine.register_memory(memory)
    assert first.verbs == ["register", "unregister"]
    assert second.verbs == ["register"]
    assert _published(engine) == []
    second.refuses = ""
    assert engine.register_memory(memory).address == address(memory)


def test_a_record_that_is_refused_leaves_the_region_registered_nowhere(
    engine: TransferEngine, store: MemoryStore
) -> None:
    store.close()
    with pytest.raises(MetadataError):
        engine.register_memory(pages(1 << 16))
    for scheme in ("tcp", "shm"):
        assert _pinning(engine, scheme).verbs == ["register", "unregister"]
    assert _published(engine) == []


def test_a_transport_that_does_not_let_go_is_told_and_so_are_the_others(
    engine: TransferEngine,
) -> None:
    region = engine.register_memory(pages(1 << 16))
    for scheme in ("tcp", "shm"):
        _pinning(engine, scheme).refuses = "unregister"
    with pytest.raises(PathUnavailable, match="cannot unregister"):
        engine.unregister_memory(region)
    for scheme in ("tcp", "shm"):
        assert _pinning(engine, scheme).verbs == ["register", "unregister"]
    assert _published(engine) == []


def test_memory_does_not_come_back_before_every_transport_has_let_go_of_it(
    engine: TransferEngine,
) -> None:
    memory = pages(1 << 16)
    region = engine.register_memory(memory)
    pinning = _pinning(engine)
    pinning.entered.clear()
    pinning.gate.clear()
    leaving = threading.Thread(target=engine.unregister_memory, args=(region,))
    coming = threading.Thread(target=engine.register_memory, args=(memory,))
    leaving.start()
    assert pinning.entered.wait(SOON)
    coming.start()
    coming.join(0.1)  # would be through by now if it did not wait
    assert pinning.verbs == ["register", "unregister"]
    pinning.gate.set()
    for thread in (leaving, coming):
        thread.join(SOON)
    assert pinning.verbs == ["register", "unregister", "register"]


def test_a_faulty_transport_passes_on_what_it_hears(engine: TransferEngine) -> None:
    install(engine, Faults())
    inner = engine.transports["tcp"]
    assert isinstance(inner, FaultyTransport)
    pinning = inner._inner
    assert isinstance(pinning, Pinning)
    engine.unregister_memory(engine.register_memory(pages(1 << 16)))
    assert pinning.verbs == ["register", "unregister"]


def test_memory_of_a_device_is_taken_where_a_transport_says_so_on_this_machine(
    engine: TransferEngine,
) -> None:
    with pytest.raises(PathUnavailable, match="reaches device memory"):
        engine.register_memory(1 << 40, 4096, "cuda:0")
    _pinning(engine).capabilities = Capabilities(device_memory=True)
    assert engine.register_memory(1 << 40, 4096, "cuda:0").location == "cuda:0"


def test_pages_of_less_than_nothing_are_refused(engine: TransferEngine) -> None:
    with pytest.raises(InvalidTransfer, match="-1 bytes"):
        engine.register_memory(pages(1 << 16), page_bytes=-1)
