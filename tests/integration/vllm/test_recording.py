"""A demo request's real pages, written down by both servers and moved again without vLLM.

The recording stays where `tests/rdma` finds it: no vLLM runs on the emulated machine there.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

import pytest
from demo_vllm import LENGTHS
from engines import config
from etcd_stage import wait_until
from kv_recording import MARK, Recording, Side, path, read, save
from kv_replay import replay
from vllm_requests import KEEP, ask, send
from vllm_stage import IDLE_S, PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm_stage import Stage

pytestmark = pytest.mark.integration

LIMIT = 8 << 20  # bytes of a recording


@pytest.fixture
def recording(stage: Stage, prompt: Callable[[int], list[int]]) -> Recording:
    """The longest prompt of the demo, as each side held it; saved for the tests on RDMA."""
    ask(stage.prefill, prompt(130))  # so that the two sides do not take pages of the same ids
    ids = prompt(max(LENGTHS))
    name = f"{MARK}{uuid.uuid4().hex}"
    keep = {**KEEP, "transfer_id": name}
    answer = send(stage.prefill, ids, max_tokens=1, kv_transfer_params=keep)
    tokens = ask(stage.decode, ids, kv_transfer_params=answer["kv_transfer_params"])
    assert tokens == ask(stage.aggregated, ids)  # what decode held was right to use
    files = [stage.recordings / f"{name}.{side}" for side in ("prefill", "decode")]
    for file in files:
        wait_until(file.exists, IDLE_S, f"a server writes {file}")
    prefill, decode = (read(file, Side) for file in files)
    whole = Recording(tokens=len(ids), prefill=prefill, decode=decode)
    save(path(), whole)
    return whole


@pytest.mark.parametrize("protocol", ["tcp", "shm"])
def test_a_recorded_request_is_moved_again_bit_by_bit(recording: Recording, protocol: str) -> None:
    prefill, decode = recording.prefill, recording.decode
    assert prefill.contents == decode.contents
    assert all(any(pages) for pages in decode.contents.values())
    assert prefill.ids != decode.ids, "the same ids on both sides prove less"
    assert path().stat().st_size <= LIMIT
    replayed = replay(path(), config(protocol), config(protocol))
    assert replayed == ("", [], 0, {protocol: 1}, len(decode.ids[0]) * PAGE_BYTES)
