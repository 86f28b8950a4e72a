"""Engines for tests: loopback addresses only, any free port, no server."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import numpy as np
from mooncake_engine import EngineConfig, MetadataConfig, TcpConfig, TransferEngine
from mooncake_engine.testing.faults import Faults, install

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mooncake_engine import Batch, Segment
    from numpy.typing import NDArray

#: No test waits longer for what should come at once; only a broken engine takes so long.
SOON = 10.0


def config(protocol: str = "loopback", **fields: Any) -> EngineConfig:  # noqa: ANN401 - whatever a field takes
    settings = {
        "protocol": protocol,
        "strict_transport": True,
        "host": "127.0.0.1",
        "tcp": TcpConfig(min_port=0, max_port=0),
        "metadata": MetadataConfig(p2p_min_port=0, p2p_max_port=0),
    }
    return EngineConfig(**(settings | fields))


def address(memory: NDArray[np.uint8]) -> int:
    return int(memory.__array_interface__["data"][0])


class Two:
    """Two engines of this process over loopback, `near` reading from `far` through `faults`."""

    def __init__(self, near: TransferEngine, far: TransferEngine, length: int) -> None:
        self.near = near
        self.far = far
        self.memory = near.allocate(length)
        self.source = far.allocate(length)
        self.source[:] = np.random.default_rng(1).integers(0, 256, length, np.uint8)
        self.faults = Faults()
        install(near, self.faults)

    def open(self) -> Segment:
        return self.near.open_segment(self.far.name)

    def row(self, first: int = 0, length: int | None = None) -> tuple[int, int, int]:
        length = self.memory.size - first if length is None else length
        return address(self.memory) + first, address(self.source) + first, length

    def read(self, first: int = 0, length: int | None = None, **how: Any) -> Batch:  # noqa: ANN401 - submit's keywords
        return self.near.submit("read", self.open(), [self.row(first, length)], **how)


@contextlib.contextmanager
def two_engines(length: int = 1 << 20, **fields: Any) -> Iterator[Two]:  # noqa: ANN401 - whatever a field takes
    with TransferEngine(config(**fields)) as far, TransferEngine(config(**fields)) as near:
        two = Two(near, far, length)
        yield two
        two.faults.release()
