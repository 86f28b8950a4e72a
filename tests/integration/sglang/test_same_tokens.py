"""Whatever way a request takes, its tokens are the aggregated server's."""

from __future__ import annotations

import functools
import random
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from demo_sglang import COUNTED_WITHIN_S, LENGTHS
from harness import comparison, sglang_benchmark
from harness.comparison import compare
from harness.completions import generate, post
from harness.sglang import CHUNK_TOKENS
from harness.transfers import Transfers
from server_stage import REPLY_S, until
from sglang_requests import ask, both, send
from sglang_stage import PAGE, PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sglang_stage import Stage

pytestmark = pytest.mark.integration

both_paths = pytest.mark.parametrize("path", ["tcp", "shm"])

ROW_BYTES = 1600  # of metadata that comes behind each request's pages, whatever its length


@pytest.fixture(scope="module", autouse=True)
def nothing_uncounted(session_stage: Stage) -> None:
    """A node tells each second what it counted: what earlier tests moved shall not be in ours."""
    begin, last = time.monotonic(), Transfers.of(session_stage.decode.url)

    def steady() -> bool:
        nonlocal begin, last
        now = Transfers.of(session_stage.decode.url)
        if now != last:
            begin, last = time.monotonic(), now
        return time.monotonic() - begin > 3

    until(steady, REPLY_S, "no count changes any more")


def pages(tokens: int) -> int:
    """Pages that decode reads for a prompt: prefill samples the first token, so all of them."""
    return -(-tokens // PAGE)


def compared(stage: Stage) -> comparison.Stage:
    """The servers as the demo's comparison takes them."""
    return comparison.Stage(
        stage.aggregated, stage.decode, stage.router, generate, COUNTED_WITHIN_S
    )


@pytest.mark.parametrize("length", LENGTHS)
def test_a_prompt_through_the_router_gives_the_aggregated_servers_tokens(
    stage: Stage, prompt: Callable[[int], list[int]], length: int
) -> None:
    row = compare(compared(stage), f"{length} tokens", prompt(length))
    assert row.disaggregated_tokens == row.aggregated_tokens
    assert row.equal
    assert row.kv_bytes == pages(length) * PAGE_BYTES + ROW_BYTES
    assert row.path == "shm"


@both_paths
@pytest.mark.parametrize("length", LENGTHS)
def test_a_prompt_on_either_path_gives_the_aggregated_servers_tokens(
    stage: Stage, prompt: Callable[[int], list[int]], length: int, path: str
) -> None:
    """Sent by hand, since the router hands no test parameters on."""
    ids = prompt(length)
    before = Transfers.of(stage.decode.url)
    assert both(stage, ids, path=path) == ask(stage.aggregated, ids)
    read = Transfers.gained(stage.decode.url, before, within_s=COUNTED_WITHIN_S)
    assert read.nbytes == pages(length) * PAGE_BYTES + ROW_BYTES
    assert set(read.paths) == {path}


def test_a_long_prompt_is_read_chunk_by_chunk(
    stage: Stage, prompt: Callable[[int], list[int]]
) -> None:
    ids = prompt(CHUNK_TOKENS + 1000)
    before = Transfers.of(stage.decode.url)
    assert both(stage, ids, path="tcp") == ask(stage.aggregated, ids)
    read = Transfers.gained(stage.decode.url, before, within_s=COUNTED_WITHIN_S)
    assert read.paths == {"tcp": 3}, "two chunks and the row of metadata are three reads"
    assert read.nbytes == pages(len(ids)) * PAGE_BYTES + ROW_BYTES


def test_a_prefix_that_prefill_has_cached_is_moved_like_any_other(
    stage: Stage, prompt: Callable[[int], list[int]]
) -> None:
    prefix = prompt(4 * PAGE)
    for count, suffix in enumerate((20, 84)):
        ids = prefix + prompt(suffix)
        expected = ask(stage.aggregated, ids)
        before = Transfers.of(stage.decode.url)
        answer = send(stage.router, ids)
        assert answer["output_ids"] == expected
        assert answer["meta_info"]["cached_tokens"] == count * len(prefix)
        read = Transfers.gained(stage.decode.url, before, within_s=COUNTED_WITHIN_S)
        assert read.nbytes == pages(len(ids)) * PAGE_BYTES + ROW_BYTES


def test_the_same_prompt_again_gives_the_same_tokens(
    stage: Stage, prompt: Callable[[int], list[int]]
) -> None:
    """All of it but the last token's page is in prefill's cache: the smallest extension."""
    ids = prompt(3 * PAGE)
    rows = [compare(compared(stage), "again", ids) for _ in range(3)]
    assert [row.equal for row in rows] == [True] * 3
    assert len({row.disaggregated_tokens for row in rows}) == 1


@both_paths
def test_eight_requests_at_once_each_get_their_own_tokens(
    stage: Stage, prompt: Callable[[int], list[int]], path: str
) -> None:
    prompts = [prompt(length) for length in range(100, 900, 100)]
    expected = [ask(stage.aggregated, ids) for ids in prompts]
    before = Transfers.of(stage.decode.url)
    with ThreadPoolExecutor(len(prompts)) as threads:
        asked = [threads.submit(both, stage, ids, path=path) for ids in prompts]
        assert [one.result(REPLY_S) for one in asked] == expected
    read = Transfers.gained(stage.decode.url, before, requests=8, within_s=COUNTED_WITHIN_S)
    assert set(read.paths) == {path}


def test_fifty_random_prompts_give_the_aggregated_servers_tokens(
    stage: Stage, prompt: Callable[[int], list[int]]
) -> None:
    choose = random.Random(50)
    prompts = [prompt(choose.randint(1, 1500)) for _ in range(50)]
    ways = [
        functools.partial(ask, stage.router),
        functools.partial(both, stage, path="tcp"),
        functools.partial(both, stage, path="shm"),
    ]
    before = Transfers.of(stage.decode.url)
    with ThreadPoolExecutor(3) as threads:
        got = threads.map(lambda ids: choose.choice(ways)(ids), prompts)
        wrong = [
            len(ids)
            for ids, tokens in zip(prompts, got, strict=True)
            if tokens != ask(stage.aggregated, ids)
        ]
    assert wrong == [], "lengths of the prompts that were answered otherwise"
    read = Transfers.gained(stage.decode.url, before, requests=50, within_s=COUNTED_WITHIN_S)
    assert set(read.paths) == {"tcp", "shm"}


def test_an_answer_over_several_pages_is_right_to_its_end(
    stage: Stage, prompt: Callable[[int], list[int]]
) -> None:
    row = compare(compared(stage), "long answer", prompt(100), tokens=3 * PAGE)
    assert row.equal


def test_a_chat_through_the_router_reads_as_from_the_aggregated_server(stage: Stage) -> None:
    request: dict[str, Any] = {
        "model": "default",
        "messages": [{"role": "user", "content": "pages of keys and values " * 20}],
        "max_tokens": 24,
        "temperature": 0,
        "ignore_eos": True,
    }
    before = Transfers.of(stage.decode.url)
    texts = [
        post(server.url, "/v1/chat/completions", request, REPLY_S)["choices"][0]["message"]
        for server in (stage.aggregated, stage.router)
    ]
    assert texts[0]["content"]
    assert texts[1] == texts[0]
    read = Transfers.gained(stage.decode.url, before, within_s=COUNTED_WITHIN_S)
    assert read.nbytes > PAGE_BYTES


def test_sglangs_own_benchmark_runs_against_the_router(
    stage: Stage, logs: Path, model: Path
) -> None:
    before = Transfers.of(stage.decode.url)
    figures = sglang_benchmark.run(stage.router.url, "test", logs, model, disaggregated=True)
    assert set(figures) == set(sglang_benchmark.FIGURES)
    assert all(value > 0 for value in figures.values())
    sent = sglang_benchmark.PROMPTS
    read = Transfers.gained(stage.decode.url, before, requests=sent, within_s=COUNTED_WITHIN_S)
    assert read.nbytes >= sent * pages(sglang_benchmark.INPUT_TOKENS) * PAGE_BYTES
