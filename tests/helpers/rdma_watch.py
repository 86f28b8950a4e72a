"""Engines over RDMA in this process, and what they make and post, watched from beside.

Nothing is replaced: what is called here notes its arguments and calls on.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import msgspec
import numpy as np
import rdma_stage
from mooncake_engine import TransferEngine
from mooncake_engine.testing.target import pattern
from mooncake_engine.transport.rdma.records import RdmaEndpoint
from mooncake_engine.transport.rdma.transport import RdmaTransport
from mooncake_engine.types import Op

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mooncake_engine.transport.rdma.completions import Completions
    from mooncake_engine.transport.rdma.context import Context
    from mooncake_engine.transport.rdma.endpoint import Endpoint
    from mooncake_engine.transport.rdma.verbs.base import Opcode, QueuePair, Work
    from mooncake_engine.types import Completion

MIB = 1 << 20
LIMIT_S = 60.0  # emulated guests are slow

#: (offset here, offset there, bytes)
Run = tuple[int, int, int]


class Post(NamedTuple):
    """One chain."""

    opcode: Opcode
    requests: int
    inline: int


class Kept(NamedTuple):
    """An endpoint that was stored, and those that had to leave for it."""

    endpoint: Endpoint
    evicted: list[Endpoint]


class Side:
    """One engine with memory, its queue pairs in the order of their making, and their posts.

    `before_post` is called before each chain and `on_kept` for each new endpoint, before its peer
    hears of it; both by the lane.
    """

    def __init__(self, devices: tuple[str, ...], settings: dict[str, Any], length: int) -> None:
        """Args: settings: of `RdmaConfig`."""
        config = rdma_stage.config(*devices)
        rdma = msgspec.structs.replace(config.rdma, **settings)
        self.engine = TransferEngine(msgspec.structs.replace(config, rdma=rdma))
        transport = self.engine.transports["rdma"]
        assert isinstance(transport, RdmaTransport)
        self.transport = transport
        self.memory = self.engine.allocate(length)
        self.address = int(self.memory.ctypes.data)
        self.queue_pairs: list[QueuePair] = []
        self.posts: list[Post] = []
        self.kept: list[Kept] = []
        self.before_post: Callable[[], object] = lambda: None
        self.on_kept: Callable[[], object] = lambda: None
        for context in self.contexts:
            self._watch_context(context)
        self._watch_store()

    @property
    def contexts(self) -> tuple[Context, ...]:
        """Its NICs."""
        return self.transport.shared.contexts

    @property
    def published(self) -> RdmaEndpoint:
        """What peers are told."""
        return msgspec.msgpack.decode(self.transport.endpoint(), type=RdmaEndpoint)

    def move(self, op: Op, peer: Side, *runs: Run) -> Completion:
        """Move and wait; when it says OK, the bytes were checked."""
        sides = (peer, self) if op is Op.READ else (self, peer)
        for seed, side in enumerate(sides, 1):
            side.memory[:] = pattern(seed, side.memory.size)
        table = np.array(runs, np.uint64).T
        end = self.engine.submit(
            op,
            self.engine.open_segment(peer.engine.record()),
            table[0] + np.uint64(self.address),
            table[1] + np.uint64(peer.address),
            table[2],
        ).wait(LIMIT_S)
        for here, there, length in runs if end.ok else ():
            mine, its = self.memory[here : here + length], peer.memory[there : there + length]
            assert (mine == its).all(), f"{op} said OK and did not move {(here, there, length)}"
        return end

    def read(self, peer: Side, *runs: Run) -> None:
        """READ, which has to succeed."""
        end = self.move(Op.READ, peer, *runs)
        assert end.ok, end.error

    def close(self) -> None:
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _watch_context(self, context: Context) -> None:
        make: Callable[[], tuple[QueuePair, Completions]] = context.queue_pair

        def queue_pair() -> tuple[QueuePair, Completions]:
            made = make()
            self.queue_pairs.append(made[0])
            self._watch_posts(made[0])
            return made

        context.queue_pair = queue_pair  # type: ignore[method-assign]  # it calls on

    def _watch_posts(self, pair: QueuePair) -> None:
        post: Callable[..., int] = pair.post

        def noted(opcode: Opcode, work: Work, rows: slice, *keys: Any, **how: Any) -> int:  # noqa: ANN401 - handed on
            self.posts.append(Post(opcode, rows.stop - rows.start, how["inline"]))
            self.before_post()
            return post(opcode, work, rows, *keys, **how)

        pair.post = noted  # type: ignore[method-assign]  # it calls on

    def _watch_store(self) -> None:
        shared = self.transport.shared
        keep: Callable[[Endpoint, str], list[Endpoint]] = shared.keep

        def noted(endpoint: Endpoint, incarnation: str) -> list[Endpoint]:
            evicted = keep(endpoint, incarnation)
            self.kept.append(Kept(endpoint, evicted))
            self.on_kept()
            return evicted

        shared.keep = noted  # type: ignore[method-assign]  # it calls on


@contextlib.contextmanager
def two(
    *,
    ours: tuple[str, ...] = rdma_stage.OURS[:1],
    theirs: tuple[str, ...] = rdma_stage.THEIRS[:1],
    length: int = MIB,
    initiator: dict[str, Any] | None = None,
    target: dict[str, Any] | None = None,
    **both: Any,  # noqa: ANN401 - settings are of any type
) -> Iterator[tuple[Side, Side]]:
    """An initiator and a target; settings of one of them, or of both."""
    with (
        Side(theirs, both | (target or {}), length) as far,
        Side(ours, both | (initiator or {}), length) as near,
    ):
        yield near, far


def ready(endpoint: Endpoint) -> None:
    """Wait until nothing of an endpoint is under way, its own making neither."""
    deadline = time.monotonic() + LIMIT_S
    while endpoint.pinned:
        assert time.monotonic() < deadline, f"{endpoint.name} is {endpoint.state}"
        time.sleep(0.01)


def kernel_counts(device: str) -> dict[str, int]:
    """What the kernel counts on a device: {"qp": 1, "cq": 1, "mr": 0, ...}."""
    (row,) = (row for row in _rdma_tool("show") if row["ifname"] == device)
    return {kind: int(count) for kind, count in row.items() if kind not in {"ifindex", "ifname"}}


def kernel_depths(device: str) -> list[int]:
    """Entries of each completion queue that the kernel knows on a device."""
    return sorted(int(row["cqe"]) for row in _rdma_tool("show", "cq", "dev", device))


def _rdma_tool(*words: str) -> Any:  # noqa: ANN401 - JSON
    done = subprocess.run(
        ["rdma", "-j", "resource", *words], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)
