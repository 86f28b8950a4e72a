from __future__ import annotations

import mmap

import numpy as np
import pytest
from engines import SOON, address, config, two_engines
from mooncake_engine import InvalidTransfer, PathUnavailable, RegionRecord, Status, TransferEngine


def test_a_region_is_published_and_taken_back() -> None:
    with TransferEngine(config()) as engine:
        memory = np.zeros(100, np.uint16)
        region = engine.register_memory(memory)
        record = RegionRecord(address(memory), 200, "cpu")
        assert engine.record().regions == (record,)
        assert engine.open_segment(engine.name).record.regions == (record,)
        engine.unregister_memory(region)
        assert engine.record().regions == ()
        with pytest.raises(InvalidTransfer, match="no region starts at"):
            engine.unregister_memory(region)


def test_an_address_needs_a_length_and_an_array_does_not() -> None:
    with TransferEngine(config()) as engine:
        memory = np.zeros(64, np.uint8)
        with pytest.raises(InvalidTransfer, match="needs its length"):
            engine.register_memory(address(memory))
        with pytest.raises(InvalidTransfer, match="contradicts the 64 bytes"):
            engine.register_memory(memory, 32)
        assert engine.register_memory(address(memory), 32).length == 32


def test_a_view_with_gaps_is_refused_and_a_permuted_one_is_not() -> None:
    with TransferEngine(config()) as engine:
        block = np.zeros((4, 6, 8), np.float32)
        for gaps in (block[:, ::2], block[:, :, :4], block[::-1]):
            with pytest.raises(InvalidTransfer, match="not contiguous"):
                engine.register_memory(gaps)
        assert engine.register_memory(block.transpose(2, 0, 1)).length == block.nbytes


@pytest.mark.parametrize("nothing", [np.zeros(0), np.zeros((3, 0))])
def test_empty_memory_is_refused(nothing: np.ndarray) -> None:
    with TransferEngine(config()) as engine, pytest.raises(InvalidTransfer, match="positive"):
        engine.register_memory(nothing)


def test_what_is_no_memory_is_refused() -> None:
    with TransferEngine(config()) as engine:
        with pytest.raises(InvalidTransfer, match="cannot register a list"):
            engine.register_memory([1, 2])
        with pytest.raises(InvalidTransfer, match="cannot allocate 0"):
            engine.allocate(0)


def test_overlapping_regions_are_refused() -> None:
    with TransferEngine(config()) as engine:
        memory = np.zeros(64, np.uint8)
        engine.register_memory(memory)
        with pytest.raises(InvalidTransfer, match="overlap"):
            engine.register_memory(memory[10:20])


def test_registered_arrays_are_kept_alive() -> None:
    with two_engines() as two:
        where = two.row()
        del two.memory
        other = np.random.default_rng(2).bytes(1 << 20)  # what would take the freed pages
        assert two.near.submit("read", two.open(), [where]).wait(SOON).ok
        assert len(other) == 1 << 20


def test_memory_in_use_by_our_own_batch_cannot_be_unregistered() -> None:
    with two_engines() as two:
        two.faults.hold()
        unused = two.near.allocate(4096)
        batch = two.read(0, 100)
        two.faults.wait_held()
        with pytest.raises(InvalidTransfer, match="cancel the batch and wait"):
            two.near.unregister_memory(address(two.memory))
        two.near.unregister_memory(address(unused))
        batch.cancel()
        assert batch.wait(SOON).status is Status.CANCELLED
        two.near.unregister_memory(address(two.memory))


def test_device_memory_is_refused_where_no_transport_reaches_it() -> None:
    with (
        TransferEngine(config("tcp")) as engine,
        pytest.raises(PathUnavailable, match=r"memory on cuda:0: none of.*tcp"),
    ):
        engine.register_memory(1 << 40, 4096, "cuda:0")


@pytest.mark.parametrize("protocol", ["shm", "tcp"])
def test_allocated_memory_is_zero_and_starts_at_a_page(protocol: str) -> None:
    with TransferEngine(config(protocol)) as engine:
        memory = engine.allocate(10_000)
        assert memory.size == 10_000
        assert not memory.any()
        assert address(memory) % mmap.PAGESIZE == 0
        memory[:] = 1


def test_a_tensor_is_registered_with_its_own_location() -> None:
    torch = pytest.importorskip("torch", reason="torch comes with vLLM or SGLang only")
    with TransferEngine(config()) as engine:
        tensor = torch.zeros(2, 3, 4, dtype=torch.bfloat16)
        region = engine.register_memory(tensor.permute(2, 0, 1), location="ignored")
        assert (region.address, region.length, region.location) == (tensor.data_ptr(), 48, "cpu")
        with pytest.raises(InvalidTransfer, match="not contiguous"):
            engine.register_memory(torch.zeros(4, 4)[:, :2])
