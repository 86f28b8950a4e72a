"""`MooncakeDisaggConnector`: what vLLM calls. Forwards by role and decides nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from mooncake_connector.vllm.metrics import MooncakePromMetrics, MooncakeStats
from mooncake_connector.vllm.scheduler import SchedulerHalf
from mooncake_connector.vllm.settings import load
from mooncake_connector.vllm.step import Endpoint, Step
from mooncake_connector.vllm.worker import WorkerHalf

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import (
        KVConnectorTransferResults,
    )
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
        KVConnectorStats,
        PromMetric,
        PromMetricT,
    )
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

KVConnectorMetadata.register(Step)
KVConnectorHandshakeMetadata.register(Endpoint)


class MooncakeDisaggConnector(KVConnectorBase_V1, SupportsHMA):
    """Prefill/decode disaggregation by owner-moved reads of paged KV caches.

    `--kv-transfer-config '{"kv_connector": "MooncakeDisaggConnector", "kv_role": ROLE}'` with
    ROLE `kv_producer` (prefill), `kv_consumer` (decode) or `kv_both`. Settings come from
    `kv_connector_extra_config`, the file named by MOONCAKE_CONFIG_PATH, and MC_* variables.
    """

    _cache_hit_source = CacheHitSource.P2P

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        config = load(vllm_config)
        self._scheduler: SchedulerHalf
        self._worker: WorkerHalf
        if role is KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerHalf(vllm_config, kv_cache_config, config)
        else:
            self._worker = WorkerHalf(vllm_config, kv_cache_config, config)

    # ---- scheduler

    def on_new_request(self, request: Request) -> None:
        """See `SchedulerHalf.on_new_request`."""
        self._scheduler.on_new_request(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """See `SchedulerHalf.matched_tokens`."""
        return self._scheduler.matched_tokens(request, num_computed_tokens)

    def get_loaded_kv_cache_group_ids(self, request: Request) -> tuple[int, ...]:  # noqa: ARG002  # vLLM's signature
        """Every transfer group is loaded: the pages are the request's own."""
        return self._kv_cache_config.transfer_group_ids  # type: ignore[no-any-return]  # vLLM is not typed here

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """See `SchedulerHalf.allocated`."""
        self._scheduler.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """See `SchedulerHalf.build_step`."""
        return self._scheduler.build_step(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """See `SchedulerHalf.workers_reported`."""
        self._scheduler.workers_reported(connector_output)

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """For a vLLM that runs without the hybrid memory allocator."""
        return self._scheduler.finished(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """See `SchedulerHalf.finished`."""
        return self._scheduler.finished(request, block_ids)

    def set_xfer_handshake_metadata(
        self, metadata: dict[int, KVConnectorHandshakeMetadata]
    ) -> None:
        """Where the ranks' nodes listen."""
        self._scheduler.set_endpoints(metadata)

    def reset_cache(self) -> bool:
        """See `SchedulerHalf.reset_cache`."""
        return self._scheduler.reset_cache()

    # ---- worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """See `WorkerHalf.register_kv_caches`."""
        self._worker.register_kv_caches(kv_caches)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata:
        """Where this rank's node listens."""
        return self._worker.endpoint()

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Runs before blocks are zeroed or written: ends grants first."""
        self._worker.before_forward(kv_connector_metadata)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:  # noqa: ANN401, ARG002  # vLLM's signature
        """Start reading what was parked in this step."""
        self._worker.start_loads(self._get_connector_metadata())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: a request runs only after all its layers are here."""

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,
        attn_metadata: AttentionMetadata,
        **kwargs: Any,  # noqa: ANN401  # vLLM's signature
    ) -> None:
        """Nothing to save: decode reads the pages where they are."""

    def wait_for_save(self) -> None:
        """Runs behind the forward pass, also in empty steps: its pages are final now."""
        self._worker.after_forward(self._get_connector_metadata())

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:  # noqa: ARG002  # vLLM's signature
        """Sent, received and failed requests since the last step, each once."""
        return self._worker.results()

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """Counts since the last step; vLLM asks both roles."""
        if self.role is KVConnectorRole.SCHEDULER:
            return None
        return self._worker.stats()

    def shutdown(self) -> None:
        """End everything; pages are no longer touched."""
        if self.role is KVConnectorRole.SCHEDULER:
            self._scheduler.close()
        else:
            self._worker.close()

    # ---- class

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats:
        """The stats object that `data` came from."""
        return MooncakeStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], type[PromMetricT]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> MooncakePromMetrics:
        """Our names on vLLM's /metrics."""
        return MooncakePromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)
