"""vLLM's own pages go from one node to another by RDMA and arrive bit by bit.

Real servers wrote the recording, on the host: `tests/integration/vllm/test_recording.py`.
"""

from __future__ import annotations

import pytest
from kv_recording import Recording, path, read
from kv_replay import replay
from rdma_stage import OURS, THEIRS, config


@pytest.mark.parametrize("rails", [1, 2])
def test_decode_gets_what_vllms_decode_held(rails: int) -> None:
    recorded = read(path(), Recording).decode
    replayed = replay(path(), config(*THEIRS[:rails]), config(*OURS[:rails]))
    assert (replayed.error, replayed.wrong, replayed.stray) == ("", [], 0)
    assert replayed.paths == {"rdma": 1}
    assert replayed.nbytes == sum(map(len, recorded.contents.values()))
