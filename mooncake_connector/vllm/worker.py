"""The worker half: one rank's node, fed by `Step`s and asked for results every engine step."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch
import vllm
from mooncake_engine import TransferEngine
from mooncake_engine.testing.faults import Faults, install
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

from mooncake_connector.cluster import NodeRecord
from mooncake_connector.decode import FetchRequest
from mooncake_connector.device_order import call_behind
from mooncake_connector.layout import page_bytes_at
from mooncake_connector.node import Node
from mooncake_connector.peers import PeerRef
from mooncake_connector.plan import PageRun
from mooncake_connector.publish import Publication
from mooncake_connector.vllm.cache import describe, memory_of
from mooncake_connector.vllm.metrics import MooncakeStats
from mooncake_connector.vllm.step import Endpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from mooncake_connector.config import ConnectorConfig
    from mooncake_connector.vllm.step import Fetch, Remote, Step

log = logging.getLogger(__name__)


class WorkerHalf:
    """Lives in one of vLLM's worker processes; methods are called from its one thread."""

    def __init__(
        self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, config: ConnectorConfig
    ) -> None:
        """Nothing is opened before `register_kv_caches`."""
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._config = config
        # Only tests slow transfers down, so that a kill in the middle of one is certain.
        self._faults = Faults(slice_bytes=64 << 10) if config.testing else None
        self._opened = contextlib.ExitStack()
        self._node: Node | None = None
        self._threads: ThreadPoolExecutor | None = None  # waits for the GPU's kernels

    def register_kv_caches(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """Describe and register the cache, start the node, publish it.

        Raises:
            UnsupportedCache, ConfigError, ConnectorError: What is wrong, before any request.
        """
        rank = get_tensor_model_parallel_rank()
        transfer = self._vllm_config.kv_transfer_config
        spec, layout = describe(self._vllm_config, self._kv_cache_config, kv_caches, rank)
        with _cpus_of_parent(), contextlib.ExitStack() as opening:
            engine = opening.enter_context(TransferEngine(self._config.engine))
            if self._faults is not None:
                install(engine, self._faults)
            for address, nbytes, location in memory_of(kv_caches):
                page_bytes = page_bytes_at(layout, address, nbytes)
                engine.register_memory(address, nbytes, location=location, page_bytes=page_bytes)
            self._node = Node(
                self._config, engine, engine_id=transfer.engine_id, spec=spec, layout=layout
            )
            opening.callback(self._node.close)
            record = NodeRecord(
                engine_id=transfer.engine_id,
                rank=rank,
                tp_size=spec.tp_size,
                role=transfer.kv_role,
                control=self._node.address,
                incarnation=self._node.incarnation,
                framework="vllm",
                version=vllm.__version__,
                http_url=self._config.http_url,
                dp_rank=self._vllm_config.parallel_config.data_parallel_index,
            )
            opening.enter_context(Publication(engine.store, self._node, record))
            if any(tensor.is_cuda for tensor in kv_caches.values()):
                # One thread: what is said of a transfer keeps its order.
                self._threads = ThreadPoolExecutor(1, "mooncake-kernels")
                opening.callback(self._threads.shutdown, cancel_futures=True)
            self._opened = opening.pop_all()
        log.info(
            "rank %d of engine %s: %d pages of %d tokens, control endpoint %s",
            rank,
            transfer.engine_id,
            self._kv_cache_config.num_blocks,
            spec.page_size,
            self._node.address,
        )

    @property
    def node(self) -> Node:
        """The node; exists from `register_kv_caches` on."""
        assert self._node is not None, "vLLM registers its KV caches before the first step"
        return self._node

    def endpoint(self) -> Endpoint:
        """Where this rank listens, for the scheduler half."""
        return Endpoint(self.node.address, self.node.incarnation)

    def before_forward(self, step: Step) -> None:
        """End grants whose blocks this step may reuse; then open new transfers."""
        for ended in step.ended:
            self.node.prefill.end(ended.transfer_id, ended.reason, retry=ended.retry)
        for opened in step.opened:
            self.node.prefill.open(*opened)

    def start_loads(self, step: Step) -> None:
        """Start and stop fetches; all of it is posted to the node.

        On a GPU a fetch waits for the kernels launched before: the last owner of its blocks may
        still be writing them.
        """
        node = self.node
        for remote in step.claims:
            node.claim(remote.transfer_id, self._peer(remote))
        if step.fetches:
            fetches = [(fetch.remote.delay_s, self._request(fetch)) for fetch in step.fetches]
            self._behind_kernels(
                lambda: self._fetch(fetches),
                lambda _reason: self._fetch(fetches),  # vLLM dies of the device's error itself
            )
        for request_id in step.cancelled:
            cancel = functools.partial(node.cancel, request_id)
            self._behind_kernels(cancel, lambda _reason, cancel=cancel: cancel())  # type: ignore[misc]  # binds now
        for request_id, remote in step.declined:
            node.decline(remote.transfer_id, request_id, self._peer(remote))

    def _fetch(self, fetches: list[tuple[float, FetchRequest]]) -> None:
        for delay_s, request in fetches:
            if self._faults is not None:
                self._faults.delay_per_slice_s = delay_s
            self.node.fetch(request)

    def after_forward(self, step: Step) -> None:
        """The pages of this step are final: on a CPU now, on a GPU when its kernels have run."""
        prefill = self.node.prefill
        finals = [(final, prefill.live(final.transfer_id)) for final in step.final]
        helds = [(held, prefill.live(held.transfer_id)) for held in step.held]

        def ready() -> None:
            for final, of in finals:
                pages = _runs(final.first, final.block_ids)
                prefill.pages_ready(final.transfer_id, pages, last=final.last, of=of)
            for held, of in helds:
                prefill.hold(held.transfer_id, held.request_id, of=of)

        def failed(reason: str) -> None:
            for final, of in finals:
                prefill.end(final.transfer_id, reason, retry=False, of=of)
            for held, of in helds:
                prefill.hold(held.transfer_id, held.request_id, of=of)

        if finals or helds:
            self._behind_kernels(ready, failed)

    def _behind_kernels(self, call: Callable[[], None], otherwise: Callable[[str], None]) -> None:
        """Call when what was launched on the GPU so far has run; at once where there is none."""
        if self._threads is None:
            call()
            return
        event = torch.cuda.Event()
        event.record()
        call_behind(self._threads, [event], call, otherwise)

    def results(self) -> KVConnectorTransferResults:
        """What ended since the last step."""
        received = self.node.take_results()
        return KVConnectorTransferResults(
            finished_sending=self.node.prefill.take_sent(),
            finished_recving=set(received.received),
            failed_recving=set(received.failed),
        )

    def stats(self) -> MooncakeStats | None:
        """What was counted since the last step; None when nothing happened."""
        counts = self.node.stats.take(self.node.prefill.held_pages())
        if counts is None:
            return None
        if self.node.rank:  # vLLM adds the ranks up, and every rank receives every request
            counts.requests = 0
        return MooncakeStats.of(counts)

    def close(self) -> None:
        """Withdraw, end all transfers, unregister. Idempotent."""
        self._opened.close()

    def _peer(self, remote: Remote) -> PeerRef:
        rank = self.node.rank
        known = rank < len(remote.addresses)
        return PeerRef(
            address=remote.addresses[rank] if known else "",
            incarnation=remote.incarnations[rank] if rank < len(remote.incarnations) else "",
            bootstrap="" if known else remote.bootstrap,
            engine_id=remote.engine_id,
            rank=rank,
            protocol=remote.protocol,
        )

    def _request(self, fetch: Fetch) -> FetchRequest:
        return FetchRequest(
            request_id=fetch.request_id,
            transfer_id=fetch.remote.transfer_id,
            peer=self._peer(fetch.remote),
            wanted=_runs(fetch.first, fetch.block_ids),
            tokens=fetch.tokens,
            prompt_key=fetch.prompt_key,
        )


@contextlib.contextmanager
def _cpus_of_parent() -> Iterator[None]:
    """Threads started here may run on every CPU that vLLM's parent process may use.

    vLLM's CPU backend pins a worker to its compute cores, and its main thread spins there. Threads
    that inherit this starve: heartbeats came more than 10 s late.
    """
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, os.sched_getaffinity(os.getppid()))
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)


def _runs(first: tuple[int, ...], block_ids: tuple[list[int], ...]) -> tuple[PageRun, ...]:
    return tuple(
        PageRun(start, np.asarray(ids, np.uint64))
        for start, ids in zip(first, block_ids, strict=True)
    )
