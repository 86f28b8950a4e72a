"""The scheduler half: splits by what a request asks for, collects one `Step` per engine step."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from mooncake_connector.prompt_key import prompt_key
from mooncake_connector.publish import Bootstrap
from mooncake_connector.vllm.requests_in import DecodeRequests
from mooncake_connector.vllm.requests_out import PrefillRequests
from mooncake_connector.vllm.step import Endpoint, Step

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from mooncake_connector.config import ConnectorConfig


log = logging.getLogger(__name__)


class SchedulerHalf:
    """Lives in vLLM's EngineCore process; every method is called from its one thread."""

    def __init__(
        self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, config: ConnectorConfig
    ) -> None:
        """Starts nothing; `set_endpoints` does."""
        transfer = vllm_config.kv_transfer_config
        self._engine_id = transfer.engine_id
        self._config = config
        self._bootstrap: Bootstrap | None = None
        self._step = Step()
        self._groups = kv_cache_config.transfer_group_ids
        page_size = vllm_config.cache_config.block_size
        windows = [
            getattr(group.kv_cache_spec, "sliding_window", None) or 0
            for group in kv_cache_config.transfer_groups
        ]
        self.out = (
            PrefillRequests(transfer.engine_id, page_size, windows, self._groups)
            if transfer.is_kv_producer
            else None
        )
        self.into = (
            DecodeRequests(page_size, windows, self._groups, testing=config.testing)
            if transfer.is_kv_consumer
            else None
        )

    def set_endpoints(self, endpoints: dict[int, Endpoint]) -> None:
        """Where each rank listens, by rank; once at start."""
        if self.out is None:
            return
        self.out.endpoints = [endpoints[rank] for rank in sorted(endpoints)]
        if self._config.bootstrap_port:
            addresses = {rank: endpoint.address for rank, endpoint in endpoints.items()}
            self._bootstrap = Bootstrap(self._config, self._engine_id, addresses)

    def close(self) -> None:
        """Stop the bootstrap server. Idempotent."""
        if self._bootstrap is not None:
            self._bootstrap.close()

    def on_new_request(self, request: Request) -> None:
        """A request arrived; also vLLM's notice that it rejected one."""
        params = request.kv_transfer_params
        if not params:
            return
        if request.prompt_token_ids is None:
            self._computes_itself(request, "its prompt is embeddings, which have no tokens")
        elif params.get("do_remote_decode"):
            if self.out is None:
                self._computes_itself(request, "do_remote_decode needs a kv_producer, not us")
            else:
                self.out.add(
                    request.request_id,
                    params,
                    request.num_prompt_tokens,
                    key_of(request),
                    self._step,
                )
        elif params.get("do_remote_prefill"):
            if self.into is None:
                self._computes_itself(request, "do_remote_prefill needs a kv_consumer, not us")
            else:
                self.into.add(request.request_id, params, key_of(request), self._step)

    def matched_tokens(self, request: Request, num_computed: int) -> tuple[int | None, bool]:
        """How many prompt tokens beyond `num_computed` come from prefill, asynchronously."""
        if self.into is None:
            return 0, False
        return self.into.matched_tokens(request.request_id, request.num_prompt_tokens, num_computed)

    def allocated(self, request: Request, blocks: KVCacheBlocks, num_external: int) -> None:
        """Blocks were given to a request; external tokens are to be read into them."""
        if self.into is not None and self.into.knows(request.request_id):
            self.into.allocated(
                request.request_id,
                request.num_prompt_tokens,
                [blocks.blocks[group] for group in self._groups],
                num_external,
                self._step,
            )

    def finished(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """A request ended; True keeps its blocks until the workers report it sent."""
        from vllm.v1.request import RequestStatus

        if self.into is not None:
            self.into.finished(request.request_id, self._step)
        if self.out is None or not any(block_ids):
            # No blocks: rejected by the API server before it was admitted.
            complete = False
        else:
            complete = request.status in (
                RequestStatus.FINISHED_LENGTH_CAPPED,
                RequestStatus.FINISHED_STOPPED,
            )
        if self.out is None:
            return False, None
        return self.out.finished(
            request.request_id, request.status.name, complete=complete, step=self._step
        )

    def build_step(self, scheduled: SchedulerOutput) -> Step:
        """What happened since the last step, for the workers."""
        if self.out is not None and self.out.busy:
            self.out.scheduled(scheduled, self._step)
        step, self._step = self._step, Step()
        return step

    def workers_reported(self, output: KVConnectorOutput) -> None:
        """All ranks agree that these requests' transfers ended."""
        if self.into is not None:
            self.into.received(output.finished_recving or ())
        if self.out is not None:
            self.out.sent(output.finished_sending or ())

    def reset_cache(self) -> bool:
        """Weights changed: KV computed so far must not be given to anybody."""
        if self.out is not None:
            self.out.reset(self._step)
        return True

    def _computes_itself(self, request: Request, why: str) -> None:
        log.warning("request %s is computed here: %s", request.request_id, why)


def key_of(request: Request) -> str:
    """The request's prompt key: all that its KV depends on beside the model."""
    extras = []
    if request.lora_request is not None:
        extras.append(f"lora={request.lora_request.lora_name}")
    for feature in request.mm_features or ():
        position = feature.mm_position
        extras.append(f"mm={feature.identifier}@{position.offset}+{position.length}")
    if request.cache_salt:
        extras.append(f"salt={request.cache_salt}")
    return prompt_key(request.prompt_token_ids, extras)
