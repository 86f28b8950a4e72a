"""What needs servers of its own: preemption in a cache that is too small, two ranks a side."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
import vllm_stage
from harness.transfers import Transfers
from server_stage import REPLY_S, until
from vllm_requests import ask, both_at_once, prefill_first
from vllm_stage import PAGE_BYTES, metric

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.integration, pytest.mark.nightly]

ROUNDS = 20  # each preempts with a chance of about one half


def test_a_prefill_that_is_preempted_is_read_anew(logs: Path, model: Path) -> None:
    """Answers that prefill writes itself grow until the prompt behind them loses its pages."""
    small = {"prefill": ("--kv-cache-memory-bytes", str(40 * PAGE_BYTES))}
    small["prefill"] += ("--max-num-batched-tokens", "64")  # the last one counts
    with vllm_stage.opened(logs / "preempted", model, **small) as stage:
        for number in range(ROUNDS):
            growing = [stage.prompt(150 + 9 * i, "growing") for i in range(6)]
            asked = stage.prompt(1200, "asked")
            expected = [ask(stage.aggregated, ids, max_tokens=200) for ids in growing]
            with ThreadPoolExecutor(6) as threads:
                others = [threads.submit(ask, stage.prefill, i, max_tokens=200) for i in growing]
                until(lambda: vllm_stage.running(stage.prefill) == 6, REPLY_S, "prefill is busy")
                assert both_at_once(stage, asked) == ask(stage.aggregated, asked), number
                assert [one.result(REPLY_S) for one in others] == expected
            stage.idle()
            if (
                "starts over: prefill gave it up: prefill preempted it"
                in stage.decode.log.read_text()
            ):
                break
        assert metric(stage.prefill, "vllm:num_preemptions_total") > 0
        assert "prefill preempted it" in stage.decode.log.read_text()


def test_two_ranks_a_side_move_their_own_halves(logs: Path, model: Path) -> None:
    """Rank r reads from rank r; each holds one of the two KV heads."""
    two = ("--tensor-parallel-size", "2")
    with vllm_stage.opened(logs / "two-ranks", model, prefill=two, decode=two) as stage:
        for way in (prefill_first, both_at_once):
            for length in (1, 64, 65, 500, 1000):
                ids = stage.prompt(length)
                before = Transfers.of(stage.decode.url)
                assert way(stage, ids) == ask(stage.aggregated, ids)
                moved = Transfers.of(stage.decode.url).since(before)
                assert moved.nbytes == -(-(length - 1) // 64) * PAGE_BYTES
        stage.idle()
