"""Whole nodes on numpy caches for tests: real engines, real sockets, any free port."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from engines import config as engine_config
from mooncake_engine import TransferEngine
from mooncake_engine.testing.faults import Faults, install

from mooncake_connector.config import ConnectorConfig
from mooncake_connector.decode import FetchRequest
from mooncake_connector.layout import CacheLayout, CacheSpec, GroupSpec, layer_layout
from mooncake_connector.node import Node
from mooncake_connector.peers import PeerRef
from mooncake_connector.plan import PageRun

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from mooncake_connector.decode import _Fetch
    from mooncake_connector.stats import Counts

#: No test waits longer for what should come at once; only a broken node takes so long.
SOON = 20.0
#: A silent peer is dead after five beats. A node that gets no processor for a while counts that as
#: one of its own beats, so a busy machine makes these tests slow and not wrong.
FAST = {"heartbeat_interval_s": 0.1, "peer_dead_after_s": 0.5}

PAGES, HEADS, TOKENS, CONTENT, LAYERS = 32, 2, 4, 8, 2


def until(condition: Callable[[], object], what: str, timeout: float = SOON) -> None:
    """Return as soon as `condition()` is true; fail after `timeout` seconds."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"waited {timeout:g} s for {what}"
        time.sleep(0.002)  # how often to look, not how long to wait


def run(first: int, *ids: int) -> PageRun:
    """Pages `ids` at positions `first`, `first + 1`, ..."""
    return PageRun(first, np.array(ids, np.uint64))


class Clock:
    """Monotonic seconds that a test moves on."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds

    def advance(self, seconds: float) -> None:
        self.seconds += seconds


class Rank:
    """One rank: its cache, its engine, its node, and all that the node ever reported."""

    def __init__(
        self,
        name: str,
        *,
        protocol: str = "loopback",
        kinds: Sequence[str] = ("full",),
        layers: Sequence[int] = range(LAYERS),
        seed: int | None = None,
        rank: int = 0,
        tp_size: int = 1,
        now: Callable[[], float] = time.monotonic,
        spec: dict[str, object] | None = None,
        engine: dict[str, object] | None = None,
        on_peer_lost: Callable[[PeerRef, str], None] = lambda _ref, _reason: None,
        **settings: Any,  # noqa: ANN401 - whatever a setting takes
    ) -> None:
        """`seed` fills the cache with random bytes, else it is zero.

        A pipeline stage holds only some `layers`, in this order.
        """
        self.name = name
        self.cache = [
            [np.zeros((PAGES, HEADS, TOKENS, CONTENT), np.uint32) for _ in layers] for _ in kinds
        ]
        if seed is not None:
            random = np.random.default_rng(seed)
            for layer in itertools.chain(*self.cache):
                layer[:] = random.integers(1, 2**32, layer.shape, np.uint32)
        self.config = ConnectorConfig(
            engine=engine_config(protocol, **{"connect_timeout_s": 2.0, **(engine or {})}),
            **settings,
        )
        self.spec = msgspec.structs.replace(
            CacheSpec(
                model="tiny",
                model_digest="0",
                revision="",
                dtype="uint32",
                page_size=TOKENS,
                order="HTC",
                tp_rank=rank,
                tp_size=tp_size,
                groups=tuple(_group(kind, g, layers) for g, kind in enumerate(kinds)),
            ),
            **(spec or {}),
        )
        self.layout = CacheLayout(tuple(tuple(map(_layout, layers)) for layers in self.cache))
        self.faults = Faults()
        self.sent: list[str] = []
        self.received: list[str] = []  # all that ended, also the failed ones
        self.failed: dict[str, str] = {}  # with the reason
        self.failures: dict[str, int] = {}
        self.batches: list[int] = []  # bytes of each read that ended well
        self.whole = 0  # requests that were received and confirmed
        self.exposed: list[float] = []  # a figure per request that was delivered
        self._open = contextlib.ExitStack()
        with contextlib.ExitStack() as opening:
            self.engine = opening.enter_context(TransferEngine(self.config.engine))
            install(self.engine, self.faults)
            for layer in itertools.chain(*self.cache):
                self.engine.register_memory(layer)
            self.node = Node(
                self.config,
                self.engine,
                engine_id=name,
                spec=self.spec,
                layout=self.layout,
                on_peer_lost=on_peer_lost,
                now=now,
            )
            opening.callback(self.node.close)
            opening.callback(self.faults.release)
            self._open = opening.pop_all()

    def close(self) -> None:
        """Close node and engine, and look once more for reports. Idempotent."""
        self._open.close()
        self.look()

    @property
    def bytes_read(self) -> int:
        """Bytes of all reads that ended well, up to the last look."""
        return sum(self.batches)

    @property
    def ref(self) -> PeerRef:
        """How decode names this rank."""
        return PeerRef(
            address=self.node.address,
            incarnation=self.node.incarnation,
            engine_id=self.name,
            rank=self.node.rank,
        )

    # What the framework does on the prefill side.

    def offer(self, *runs: PageRun, transfer: str = "t", key: str = "key") -> None:
        """Compute a prompt and hold its pages; the request is called "p-<transfer>"."""
        self.compute(*runs, transfer=transfer, key=key)
        self.node.prefill.hold(transfer, f"p-{transfer}")

    def compute(self, *runs: PageRun, transfer: str = "t", key: str = "key") -> None:
        """Compute a whole prompt that has not finished yet."""
        self.node.prefill.open(transfer, f"p-{transfer}", key)
        self.node.prefill.pages_ready(transfer, runs, last=True)

    # What the framework does on the decode side.

    def fetch(
        self,
        prefill: PeerRef,
        *wanted: PageRun,
        request: str = "d",
        transfer: str = "t",
        key: str = "key",
        readers: int = 1,
    ) -> None:
        """Ask for pages."""
        self.node.fetch(
            FetchRequest(
                request_id=request,
                transfer_id=transfer,
                peer=prefill,
                wanted=wanted,
                tokens=TOKENS * max(w.end for w in wanted),
                prompt_key=key,
                readers=readers,
            )
        )

    def pages(self, run: PageRun, group: int = 0) -> np.ndarray:
        """A copy of these pages' values in all layers."""
        return np.stack([layer[run.ids.astype(np.int64)] for layer in self.cache[group]])

    # What the framework asks every step.

    def look(self) -> None:
        """Add what ended since the last look."""
        self.sent += self.node.prefill.take_sent()
        results = self.node.take_results()
        assert results.failed.keys() <= results.received
        self.received += results.received
        self.failed |= results.failed
        self._count(self.node.stats.take(self.node.prefill.held_pages()))

    def _count(self, counts: Counts | None) -> None:
        if counts is not None:
            self.batches += counts.nbytes
            self.whole += counts.requests
            self.exposed += counts.exposed
            for reason, times in counts.failures.items():
                self.failures[reason] = self.failures.get(reason, 0) + times

    def await_sent(self, transfer: str = "t", timeout: float = SOON) -> None:
        """Wait until the held pages of a transfer may be freed."""

        def freed() -> bool:
            self.look()
            return f"p-{transfer}" in self.sent

        until(freed, f"{self.name} to free {transfer}", timeout)

    def await_end(self, request: str = "d", timeout: float = SOON) -> bool:
        """Wait until a fetch is reported; True when its pages are right to use."""

        def ended() -> bool:
            self.look()
            return request in self.received

        until(ended, f"{self.name} to report {request}", timeout)
        return request not in self.failed

    def await_failure(self, reason: str, timeout: float = SOON) -> None:
        """Wait until a failure of this kind is counted."""

        def counted() -> bool:
            self.look()
            return reason in self.failures

        until(counted, f"{self.name} to count a failure {reason}", timeout)

    def settle(self) -> None:
        """Return when all that was asked of the node before has been done."""
        done = threading.Event()
        self.node._loop.call_soon_threadsafe(done.set)
        assert done.wait(SOON)

    # What only a test may see.

    def inside(self, request: str = "d") -> _Fetch:
        """A fetch that has not ended."""
        self.settle()
        return self.node._decode._fetches[request]

    def readers(self, transfer: str = "t") -> int:
        """How many readers subscribed to a transfer that has not ended."""
        with self.node.prefill._lock:
            hold = self.node.prefill._live.get(transfer)
            return len(hold.readers) if hold else 0

    def claims(self, transfer: str = "t") -> int:
        """How many decode nodes claim a transfer that has not ended."""
        with self.node.prefill._lock:
            hold = self.node.prefill._live.get(transfer)
            return len(hold.claims) if hold else 0


@contextlib.contextmanager
def ranks() -> Iterator[Callable[..., Rank]]:
    """Makes ranks, closes them at the end, and checks that nothing was ever reported twice."""
    made: list[Rank] = []

    def make(name: str, **options: Any) -> Rank:  # noqa: ANN401 - Rank's
        made.append(Rank(name, **options))
        return made[-1]

    try:
        yield make
    finally:
        for rank in made:
            rank.close()
    for rank in made:
        for what, reports in (("sent", rank.sent), ("received", rank.received)):
            assert len(reports) == len(set(reports)), f"{rank.name}: {what} twice: {reports}"


def _group(kind: str, index: int, layers: Sequence[int]) -> GroupSpec:
    return GroupSpec(
        kind=kind,  # type: ignore[arg-type]  # a test's mistake shows at once
        window=2 * TOKENS if kind == "window" else 0,
        layers=tuple(f"group{index}.layer{n}" for n in layers),
        page_bytes=(HEADS * TOKENS * CONTENT * 4,) * len(layers),
    )


def _layout(layer: np.ndarray) -> Any:  # noqa: ANN401 - LayerLayout
    return layer_layout(
        layer.__array_interface__["data"][0],
        layer.shape,
        [stride // layer.itemsize for stride in layer.strides],
        layer.itemsize,
        PAGES,
    )
