"""What the servers say about their transfers, on /metrics and in their logs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from harness.servers import get
from prometheus_client.parser import text_string_to_metric_families
from server_stage import until
from vllm_requests import ask, prefill_first, prefill_leg
from vllm_stage import PAGE_BYTES, metric

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm_stage import Stage

pytestmark = pytest.mark.integration

PREFIX = "mooncake_connector:"
NAMES = {
    "transfer_seconds": "histogram",
    "transfer_bytes": "histogram",
    "transfer_descriptors": "histogram",
    "transfer_runs": "histogram",
    "exposed_seconds": "histogram",
    "requests": "counter",
    "path_batches": "counter",
    "failures": "counter",
    "held_pages": "gauge",
}


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_both_sides_offer_every_metric(stage: Stage, side: str) -> None:
    text = get(getattr(stage, side).url, "/metrics", 30)[1]
    offered = {
        family.name.removeprefix(PREFIX): family.type
        for family in text_string_to_metric_families(text)
        if family.name.startswith(PREFIX) and not family.name.endswith("_created")
    }
    assert offered == NAMES


def test_a_transfer_is_counted_once_and_in_the_right_units(
    stage: Stage, prompt: Callable[[int], list[int]]
) -> None:
    counted = {
        "requests_total": 1,
        "path_batches_total": 1,
        "transfer_bytes_sum": 4 * PAGE_BYTES,
        "transfer_bytes_count": 1,
        "transfer_seconds_count": 1,
        "transfer_descriptors_sum": 4 * 4,  # pages x layers
        "transfer_runs_count": 1,
        "failures_total": 0,
    }
    before = {name: metric(stage.decode, PREFIX + name) for name in counted}
    prefill_first(stage, prompt(240))
    after = {name: metric(stage.decode, PREFIX + name) for name in counted}
    assert {name: after[name] - before[name] for name in counted} == counted


def test_a_prompt_that_prefill_refuses_is_counted_and_the_right_one_is_still_served(
    stage: Stage, prompt: Callable[[int], list[int]]
) -> None:
    """The parameters lack their prompt key, so that only prefill can see the difference."""
    right, wrong = prompt(200), prompt(200)
    params = prefill_leg(stage, right)
    del params["remote_prompt_key"]
    name = PREFIX + "failures_total"
    gone = metric(stage.decode, name, reason="gone")
    differs = metric(stage.prefill, name, reason="prompt_differs")
    assert ask(stage.decode, wrong, kv_transfer_params=params) == ask(stage.aggregated, wrong)
    assert metric(stage.decode, name, reason="gone") == gone + 1
    until(
        lambda: metric(stage.prefill, name, reason="prompt_differs") == differs + 1,
        10,
        "prefill counted its refusal",
    )
    received = metric(stage.decode, PREFIX + "requests_total")
    assert ask(stage.decode, right, kv_transfer_params=params) == ask(stage.aggregated, right)
    assert metric(stage.decode, PREFIX + "requests_total") == received + 1


def test_decode_logs_its_transfers(stage: Stage, prompt: Callable[[int], list[int]]) -> None:
    """The line that vLLM prints every ten seconds while it is asked."""

    def logged() -> bool:
        prefill_first(stage, prompt(100), max_tokens=1)
        return "KV Transfer metrics: requests=" in stage.decode.log.read_text()

    until(logged, 40, "vLLM logs the transfers")
    assert "Traceback" not in stage.decode.log.read_text()
