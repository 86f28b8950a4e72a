"""The peers' connectors as a machine without a GPU lets them start; vLLM imports this by name.

`kv_connector_module_path: serving.vllm_on_cpu`. Nothing else about the peers is changed, and what
is changed is named in the result (`NEEDED` in `vllm_setups.py`). Measured with vLLM 0.32.0.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.mooncake_connector import (
    MooncakeConnector,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlConnector
from vllm.platforms import current_platform

if TYPE_CHECKING:
    from collections.abc import Iterator


class UnpinnedNixlConnector(NixlConnector):  # type: ignore[misc]  # vLLM's classes are Any here
    """NIXL's without the pinning.

    On a CPU its worker moves itself onto the last core of each NUMA node, where the model then
    runs too: on two cores, prefill's and decode's workers share one, and the other stays idle.
    """

    def __init__(self, *arguments: Any, **more: Any) -> None:  # noqa: ANN401 - vLLM's own, as given
        with _pinning_ignored():
            super().__init__(*arguments, **more)


class CpuMooncakeConnector(MooncakeConnector):  # type: ignore[misc]  # ditto
    """Mooncake's, whose worker asks which accelerator it runs on, and ends where there is none."""

    def __init__(self, *arguments: Any, **more: Any) -> None:  # noqa: ANN401 - vLLM's own, as given
        torch.accelerator.current_device_index = lambda: 0
        # Its threads ask the platform to select that device before they send.
        type(current_platform).set_device = classmethod(lambda _platform, _device: None)
        super().__init__(*arguments, **more)


@contextlib.contextmanager
def _pinning_ignored() -> Iterator[None]:
    with mock.patch.object(os, "sched_setaffinity"):
        yield
