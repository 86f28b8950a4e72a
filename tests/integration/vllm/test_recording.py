"""A demo request's real pages, written down by both servers and moved again without vLLM.

The recording stays where `tests/rdma` finds it: no vLLM runs on the emulated machine there.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

import pytest
from demo_vllm import LENGTHS
from engines import config
from kv_recording import MARK, Recording, Side, path, read, save
from kv_replay import replay
from vllm_requests import KEEP, ask, send
from vllm_stage import PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm_stage import Stage

pytestmark = pytest.mark.integration

LENGTH = max(LENGTHS)
LIMIT = 8 << 20  # bytes of a recording


def test_a_recorded_request_is_moved_again_bit_by_bit(
    stage: Stage, prompt: Callable[[int], list[int]]
) -> None:
    """The longest prompt of the demo."""
    prefill, decode = sides(stage, prompt(LENGTH))
    if prefill.ids == decode.ids:  # as in two fresh servers: that would prove less
        ask(stage.prefill, prompt(130))  # the next prompt gets other pages there
        prefill, decode = sides(stage, prompt(LENGTH))
    assert prefill.ids != decode.ids
    assert prefill.contents == decode.contents
    assert all(any(pages) for pages in decode.contents.values())
    save(path(), Recording(tokens=LENGTH, prefill=prefill, decode=decode))
    assert path().stat().st_size <= LIMIT
    for protocol in ("tcp", "shm"):
        replayed = replay(path(), config(protocol), config(protocol))
        assert replayed == ("", [], 0, {protocol: 1}, len(decode.ids[0]) * PAGE_BYTES)


def sides(stage: Stage, ids: list[int]) -> list[Side]:
    """The prompt goes from prefill to decode; what each held, prefill's first."""
    name = f"{MARK}{uuid.uuid4().hex}"
    keep = {**KEEP, "transfer_id": name}
    answer = send(stage.prefill, ids, max_tokens=1, kv_transfer_params=keep)
    tokens = ask(stage.decode, ids, kv_transfer_params=answer["kv_transfer_params"])
    assert tokens == ask(stage.aggregated, ids)  # what decode held was right to use
    files = [stage.recordings / f"{name}.{side}" for side in ("prefill", "decode")]
    return [read(file, Side) for file in files]  # written before the servers answered
