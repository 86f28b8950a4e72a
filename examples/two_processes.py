"""Two processes move bytes over the engine, without any server.

    python examples/two_processes.py               first terminal: offers 64 MiB, prints its name
    python examples/two_processes.py NAME          second terminal: reads it, then writes into it

On one machine the bytes go through shared memory; between two machines, with `--host` naming an
address that the other one reaches, over TCP.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
from mooncake_engine import EngineConfig, TransferEngine

LENGTH = 64 << 20
NOTE = 4096  # bytes behind it, for the other side to write into


def contents() -> np.ndarray:
    """What the offered memory holds; both sides can compute it."""
    return np.random.default_rng(0).integers(0, 256, LENGTH, np.uint8)


def offer(engine: TransferEngine) -> None:
    """Register memory and serve it until standard input ends."""
    memory = engine.allocate(LENGTH + NOTE)  # for your own array: engine.register_memory(array)
    memory[:LENGTH] = contents()
    print(engine.name, flush=True)
    print("press Ctrl-D to end", file=sys.stderr)
    sys.stdin.read()
    print(f"the note says {memory[LENGTH:].tobytes().rstrip(bytes(1)).decode()!r}")


def use(engine: TransferEngine, name: str) -> None:
    """Read all of it, read pieces of it, leave a note."""
    peer = engine.open_segment(name)
    print(f"path: {peer.path.scheme} ({peer.path.reason})")
    there = peer.record.regions[0].address
    memory = engine.allocate(LENGTH)
    here = memory.ctypes.data

    end = engine.submit("read", peer, [(here, there, LENGTH)]).wait()
    assert end.ok, end.error
    assert np.array_equal(memory, contents())
    print(f"read {end.nbytes >> 20} MiB in {end.total_s * 1e3:.1f} ms")

    # Many pieces are three arrays, never a list: no Python runs per piece.
    offsets = np.arange(0, LENGTH, 64 << 10, dtype=np.uint64)
    memory[:] = 0
    batch = engine.submit(
        "read",
        peer,
        np.uint64(here) + offsets,
        np.uint64(there) + offsets[::-1],
        np.full_like(offsets, 4096),
    )
    end = batch.wait()
    assert end.ok, end.error
    assert np.array_equal(memory[:4096], contents()[int(offsets[-1]) :][:4096])
    print(f"read {end.descriptors} pieces of 4 KiB in {end.total_s * 1e3:.1f} ms")

    note = f"hello from {engine.name}".encode()
    memory[: len(note)] = np.frombuffer(note, np.uint8)
    end = engine.submit("write", peer, [(here, there + LENGTH, len(note))]).wait()
    assert end.ok, end.error
    print("left a note")


def main() -> None:
    """Offer without a name, use with one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", nargs="?", help="what the offering process printed")
    parser.add_argument("--host", default="127.0.0.1", help="our address, as the other one sees it")
    parser.add_argument("--protocol", default="auto", choices=("auto", "shm", "tcp"))
    arguments = parser.parse_args()
    config = EngineConfig(host=arguments.host, protocol=arguments.protocol)
    with TransferEngine(config) as engine:
        if arguments.name:
            use(engine, arguments.name)
        else:
            offer(engine)


if __name__ == "__main__":
    main()
