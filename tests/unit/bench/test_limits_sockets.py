from __future__ import annotations

import concurrent.futures
import mmap
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest

from mooncake_connector.bench import compiled
from mooncake_connector.bench.backends import sockets
from mooncake_connector.bench.base import BackendFailed, Route, Transfer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

pytestmark = pytest.mark.skipif(
    bool(compiled.missing()), reason="the limits' loops are in C, and no compiler is here"
)
SIZE = 8 << 20


def buffer(seed: int) -> NDArray[np.uint8]:
    memory = np.frombuffer(mmap.mmap(-1, SIZE), np.uint8)
    memory[:] = np.random.default_rng(seed).integers(0, 256, SIZE, np.uint8)
    return memory


def scattered(op: str, lengths: NDArray[np.uint64]) -> Transfer:
    """Rows of `lengths` that overlap nowhere, in another order on each side."""

    def places(seed: int) -> NDArray[np.uint64]:
        order = np.random.default_rng(seed).permutation(lengths.size)
        gaps = lengths[order] + np.uint64(seed)  # an odd one now and then, so few runs touch
        places = np.empty_like(lengths)
        places[order] = np.cumsum(gaps) - gaps
        return places

    return Transfer(op, places(0), places(7), lengths)


UNEVEN = np.random.default_rng(5).integers(1, 6000, 1500).astype(np.uint64)
LISTS = {
    "one byte": np.ones(1, np.uint64),
    "one run": np.array([5 << 20], np.uint64),
    "more than one call's runs": np.full(1300, 4096, np.uint64),
    "uneven": UNEVEN,
}


@pytest.fixture(name="target")
def _target() -> Iterator[sockets.Target]:
    target = sockets.Target(buffer(1), {})
    yield target
    target.close()


@pytest.fixture(params=[v.options for v in sockets.variants(Route.TCP)], ids=str, name="initiator")
def _initiator(
    request: pytest.FixtureRequest, target: sockets.Target
) -> Iterator[sockets.Initiator]:
    initiator = sockets.Initiator(buffer(2), request.param)
    initiator.connect(target.address())
    yield initiator
    initiator.close()


@pytest.mark.parametrize("op", ["read", "write"])
@pytest.mark.parametrize("lengths", LISTS.values(), ids=LISTS)
def test_every_listed_byte_arrives_and_no_other_changes(
    target: sockets.Target, initiator: sockets.Initiator, op: str, lengths: NDArray[np.uint64]
) -> None:
    transfer = scattered(op, lengths)
    ours, theirs = initiator._memory, target._memory
    expected = (ours if op == "read" else theirs).copy()
    for local, remote, length in zip(*map(np.ndarray.tolist, _columns(transfer)), strict=True):
        if op == "read":
            expected[local : local + length] = theirs[remote : remote + length]
        else:
            expected[remote : remote + length] = ours[local : local + length]
    initiator.prepare(transfer)()
    assert np.array_equal(ours if op == "read" else theirs, expected)


def _columns(transfer: Transfer) -> tuple[NDArray[np.uint64], ...]:
    return transfer.local, transfer.remote, transfer.lengths


def test_each_run_moves_what_the_memory_holds_at_that_time(target: sockets.Target) -> None:
    initiator = sockets.Initiator(buffer(2), {"streams": "2"})
    initiator.connect(target.address())
    transfer = scattered("read", UNEVEN)
    run = initiator.prepare(transfer)
    for value in (1, 2):
        target._memory[:] = value
        run()
        assert initiator._memory[int(transfer.local[3])] == value
    initiator.close()


def test_one_that_python_calls_each_time_says_what_c_took(target: sockets.Target) -> None:
    initiator = sockets.Initiator(buffer(2), {"streams": "2", "called": "1"})
    initiator.connect(target.address())
    run = initiator.prepare(scattered("read", UNEVEN))
    began = time.perf_counter()
    assert 0 < run() <= time.perf_counter() - began
    assert not hasattr(run, "many")
    initiator.close()


def test_many_runs_are_timed_one_by_one(target: sockets.Target) -> None:
    initiator = sockets.Initiator(buffer(2), {"streams": "4"})
    initiator.connect(target.address())
    seconds = initiator.prepare(scattered("write", UNEVEN)).many(5)
    assert seconds.shape == (5,)
    assert (seconds > 0).all()
    initiator.close()


def test_threads_that_prepare_for_themselves_do_not_disturb_each_other(
    target: sockets.Target,
) -> None:
    initiator = sockets.Initiator(buffer(2), {"streams": "2"})
    initiator.connect(target.address())
    half = np.full(64, 4096, np.uint64)
    starts = np.arange(64, dtype=np.uint64) * np.uint64(8192)

    def move(shift: int) -> None:
        rows = starts + np.uint64(shift)
        initiator.prepare(Transfer("read", rows, rows, half)).many(50)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(move, (0, 4096)))
    moved = slice(0, 64 * 8192)
    assert np.array_equal(initiator._memory[moved], target._memory[moved])
    initiator.close()


def test_a_run_outside_the_targets_memory_is_refused(target: sockets.Target) -> None:
    initiator = sockets.Initiator(buffer(2), {"streams": "1"})
    initiator.connect(target.address())
    here, there = np.zeros(1, np.uint64), np.array([SIZE - 1], np.uint64)
    with pytest.raises(BackendFailed, match=r"2 bytes at offset 8388607.*outside the target's"):
        initiator.prepare(Transfer("read", here, there, np.array([2], np.uint64)))
    initiator._size = 2 * SIZE  # the target checks for itself
    with pytest.raises(BackendFailed, match="did not take a list"):
        initiator.prepare(Transfer("read", here, there, np.array([2], np.uint64)))
    initiator.close()


def test_nobody_at_the_targets_address_is_said() -> None:
    target = sockets.Target(buffer(1), {})
    address = target.address()
    target.close()
    initiator = sockets.Initiator(buffer(2), {"streams": "1"})
    with pytest.raises(BackendFailed, match=r"cannot connect to the target at 127\.0\.0\.1"):
        initiator.connect(address)
    initiator.close()


CHILD = """
import mmap, sys, msgspec, numpy as np
from mooncake_connector.bench.backends import sockets
target = sockets.Target(np.frombuffer(mmap.mmap(-1, 8 << 20), np.uint8), {})
print(msgspec.json.encode(target.address()).decode(), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("op", ["read", "write"])
@pytest.mark.parametrize("streams", ["1", "4"])
def test_the_targets_death_ends_a_run_with_an_error(op: str, streams: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        address = msgspec.json.decode(child.stdout.readline(), type=dict[str, str])
        initiator = sockets.Initiator(buffer(2), {"streams": streams})
        initiator.connect(address)
        run = initiator.prepare(scattered(op, UNEVEN))
        run()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            moving = pool.submit(run.many, 1 << 24)  # hours of runs
            child.kill()
            with pytest.raises(BackendFailed, match=f"with {address['host']}:{address['port']}"):
                moving.result(20)
    initiator.close()
