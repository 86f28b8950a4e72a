from __future__ import annotations

import mmap
import subprocess
import sys

import msgspec
import numpy as np
import pytest

from mooncake_connector.bench import compiled
from mooncake_connector.bench.backends import memcpy
from mooncake_connector.bench.base import BackendFailed, Route, Transfer

pytestmark = pytest.mark.skipif(
    bool(compiled.missing()), reason="the limits' loops are in C, and no compiler is here"
)
SIZE = 4 << 20
CHILD = """
import mmap, sys, msgspec, numpy as np
from mooncake_connector.bench.backends import memcpy
memory = np.frombuffer(mmap.mmap(-1, 4 << 20), np.uint8)
memory[:] = np.random.default_rng(1).integers(0, 256, memory.size, np.uint8)
target = memcpy.Target(memory, {"method": sys.argv[1]})
print(msgspec.json.encode(target.address()).decode(), flush=True)
sys.stdin.buffer.readline()
sys.stdout.buffer.write(memory.tobytes())
sys.stdout.buffer.flush()
target.close()
"""
LENGTHS = np.random.default_rng(5).integers(1, 3000, 1400).astype(np.uint64)
STARTS = np.cumsum(LENGTHS) - LENGTHS
ORDER = np.random.default_rng(6).permutation(LENGTHS.size)


def transfer(op: str) -> Transfer:
    """Uneven runs, one behind the other here and anywhere there."""
    places = np.empty_like(LENGTHS)
    places[ORDER] = np.cumsum(LENGTHS[ORDER]) - LENGTHS[ORDER]
    return Transfer(op, STARTS, places, LENGTHS)


@pytest.mark.parametrize("op", ["read", "write"])
@pytest.mark.parametrize(
    "options", [each.options for each in memcpy.variants(Route.SAME_HOST)], ids=str
)
def test_every_listed_byte_is_copied_and_no_other_changes(op: str, options: dict[str, str]) -> None:
    ours = np.frombuffer(mmap.mmap(-1, SIZE), np.uint8)
    ours[:] = np.random.default_rng(2).integers(0, 256, SIZE, np.uint8)
    theirs = np.random.default_rng(1).integers(0, 256, SIZE, np.uint8)
    wanted = transfer(op)
    expected = (ours if op == "read" else theirs).copy()
    columns = (wanted.local.tolist(), wanted.remote.tolist(), wanted.lengths.tolist())
    for local, remote, length in zip(*columns, strict=True):
        here, there = slice(local, local + length), slice(remote, remote + length)
        if op == "read":
            expected[here] = theirs[there]
        else:
            expected[there] = ours[here]
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, options["method"]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        initiator = memcpy.Initiator(ours, options)
        initiator.connect(msgspec.json.decode(child.stdout.readline(), type=dict[str, str]))
        initiator.prepare(wanted).many(2)
        initiator.close()
        child.stdin.write(b"\n")
        child.stdin.flush()
        held = np.frombuffer(child.stdout.read(SIZE), np.uint8)
    assert np.array_equal(ours if op == "read" else held, expected)


def test_memory_keeps_its_bytes_when_it_is_shared() -> None:
    memory = np.frombuffer(mmap.mmap(-1, SIZE), np.uint8)
    memory[:] = np.random.default_rng(3).integers(0, 256, SIZE, np.uint8)
    before = memory.copy()
    target = memcpy.Target(memory, {"method": "memcpy"})
    assert np.array_equal(memory, before)
    target.close()


def test_memory_that_is_not_whole_pages_is_refused() -> None:
    memory = np.frombuffer(mmap.mmap(-1, SIZE), np.uint8)[64:]
    with pytest.raises(BackendFailed, match="give whole pages"):
        memcpy.Target(memory, {"method": "memcpy"})


@pytest.mark.parametrize("method", ["memcpy", "process_vm"])
def test_a_target_that_has_gone_is_an_error_with_its_process(method: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, method], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        address = msgspec.json.decode(child.stdout.readline(), type=dict[str, str])
    initiator = memcpy.Initiator(
        np.frombuffer(mmap.mmap(-1, SIZE), np.uint8), {"method": method, "threads": "2"}
    )

    def reach_it() -> None:
        initiator.connect(address)
        initiator.prepare(transfer("read"))()

    with pytest.raises(BackendFailed, match=str(child.pid)):
        reach_it()
    initiator.close()
