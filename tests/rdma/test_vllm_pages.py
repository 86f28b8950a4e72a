"""vLLM's own pages go from one node to another by RDMA and arrive bit by bit.

Real servers wrote the recording, on the host: `tests/integration/vllm/test_recording.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from engines import config
from kv_recording import Recording, path, read
from kv_replay import replay
from mooncake_engine.config import RdmaConfig

if TYPE_CHECKING:
    from mooncake_engine import EngineConfig


def rdma(*devices: str) -> EngineConfig:
    """An engine that moves by these NICs or not at all."""
    return config("rdma", rdma=RdmaConfig(devices=devices, min_port=0, max_port=0))


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [
        pytest.param(("rxe1",), ("rxe0",), id="one rail"),
        pytest.param(("rxe1", "rxe3"), ("rxe0", "rxe2"), id="two rails"),
    ],
)
def test_decode_gets_what_vllms_decode_held(
    prefill: tuple[str, ...], decode: tuple[str, ...]
) -> None:
    recorded = read(path(), Recording).decode
    replayed = replay(path(), rdma(*prefill), rdma(*decode))
    assert (replayed.error, replayed.wrong, replayed.stray) == ("", [], 0)
    assert replayed.paths == {"rdma": 1}
    assert replayed.nbytes == sum(map(len, recorded.contents.values()))
