"""The connector as vLLM loads it in the integration tests: it writes down marked requests' KV.

vLLM takes the class by `kv_connector_module_path`, so nothing of this is in the package. A request
is marked by its transfer id; all others pass through untouched.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from kv_recording import FOLDER, MARK, Side, Tensor, save
from typing_extensions import override

from mooncake_connector.vllm.cache import memory_of
from mooncake_connector.vllm.connector import MooncakeDisaggConnector

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

    from mooncake_connector.layout import CacheSpec
    from mooncake_connector.vllm.step import Fetch, Step


class RecordingConnector(MooncakeDisaggConnector):
    """Writes `TRANSFER.prefill` and `TRANSFER.decode`, each a `Side`, from the two workers."""

    @override
    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        super().register_kv_caches(kv_caches)
        self._recorder = Recorder(self._worker.node._spec, kv_caches)

    @override
    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self._recorder.asked(self._get_connector_metadata())
        super().start_load_kv(forward_context, **kwargs)

    @override
    def wait_for_save(self) -> None:
        super().wait_for_save()
        self._recorder.computed(self._get_connector_metadata())

    @override
    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        results = super().get_transfer_results(finished_req_ids)
        self._recorder.received(results.finished_recving - results.failed_recving)
        return results


class Recorder:
    """Of one worker, on its one thread: between two steps nobody writes into the cache."""

    def __init__(self, spec: CacheSpec, kv_caches: Mapping[str, torch.Tensor]) -> None:
        self._spec = spec
        self._caches = kv_caches
        self._folder = Path(os.environ[FOLDER])
        self._keys: dict[str, str] = {}  # transfer id -> prompt key
        self._final: dict[str, list[list[int]]] = {}  # transfer id -> page ids per group, so far
        self._fetches: dict[str, Fetch] = {}  # by request id

    def asked(self, step: Step) -> None:
        """Decode starts to fetch these."""
        marked = [fetch for fetch in step.fetches if fetch.remote.transfer_id.startswith(MARK)]
        self._fetches |= {fetch.request_id: fetch for fetch in marked}

    def received(self, requests: set[str]) -> None:
        """Decode has these, and has not scheduled them yet."""
        for request in requests & self._fetches.keys():
            fetch = self._fetches.pop(request)
            name = f"{fetch.remote.transfer_id}.decode"
            self._write(name, fetch.prompt_key, fetch.first, fetch.block_ids)

    def computed(self, step: Step) -> None:
        """Prefill's forward pass is over."""
        for opened in step.opened:
            self._keys[opened.transfer_id] = opened.prompt_key
        for final in step.final:
            if not final.transfer_id.startswith(MARK):
                continue
            so_far = self._final.setdefault(final.transfer_id, [[] for _ in final.block_ids])
            for known, (first, ids) in zip(
                so_far, zip(final.first, final.block_ids, strict=True), strict=True
            ):
                assert first == len(known), "a recorded prompt has no sliding window"
                known.extend(ids)
            if final.last:
                ids = self._final.pop(final.transfer_id)
                key = self._keys[final.transfer_id]
                self._write(f"{final.transfer_id}.prefill", key, [0] * len(ids), ids)

    def _write(
        self, name: str, key: str, first: Sequence[int], ids: Sequence[Sequence[int]]
    ) -> None:
        storages = [address for address, _, _ in memory_of(self._caches)]
        contents = {
            layer: self._caches[layer][list(pages)].contiguous().view(torch.uint8).numpy().tobytes()
            for group, pages in zip(self._spec.groups, ids, strict=True)
            for layer in group.layers
        }
        side = Side(
            spec=self._spec,
            storages=tuple(nbytes for _, nbytes, _ in memory_of(self._caches)),
            tensors={layer: _geometry(self._caches[layer], storages) for layer in contents},
            prompt_key=key,
            first=tuple(first),
            ids=tuple(map(tuple, ids)),
            contents=contents,
        )
        save(self._folder / name, side)


def _geometry(tensor: torch.Tensor, storages: list[int]) -> Tensor:
    start = tensor.untyped_storage().data_ptr()
    return Tensor(
        storage=storages.index(start),
        offset=tensor.data_ptr() - start,
        shape=tuple(tensor.shape),
        strides=tuple(tensor.stride()),
        itemsize=tensor.element_size(),
    )
