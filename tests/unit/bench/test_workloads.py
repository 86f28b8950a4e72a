from __future__ import annotations

import msgspec
import numpy as np
import pytest
from mooncake_engine.errors import ConfigError

from mooncake_connector.bench.churn import pages_after_churn
from mooncake_connector.bench.kv import ARRANGEMENTS, MODELS, Request, kv_transfer
from mooncake_connector.bench.options import PAGE_SIZES, Options
from mooncake_connector.bench.sweep import Row
from mooncake_connector.bench.workloads import cases, scattered

MIB = 1 << 20


def neighbours(ids: np.ndarray) -> int:
    return int((np.diff(ids.astype(np.int64)) == 1).sum())


@pytest.mark.parametrize("generates", [False, True])
def test_after_churn_every_page_is_the_requests_own_and_page_0_is_nobodys(generates: bool) -> None:
    pages = pages_after_churn(512, 200, 16, seed=3, generates=generates)
    assert len(np.unique(pages)) == 200
    assert 1 <= pages.min() <= pages.max() < 512


def test_the_churn_is_that_of_its_seed() -> None:
    def churned(seed: int) -> list[int]:
        return pages_after_churn(512, 100, 16, seed, generates=True).tolist()

    assert churned(1) == churned(1) != churned(2)


def test_a_queue_keeps_more_neighbours_than_a_shuffle_and_generation_pulls_them_apart() -> None:
    prefill = pages_after_churn(8192, 2048, 1, 3, generates=False)
    decode = pages_after_churn(8192, 2048, 1, 3, generates=True)
    assert neighbours(prefill) > 200  # a shuffle of 8191 pages has 0.25 on average
    assert neighbours(decode) < neighbours(prefill) / 4


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("model", MODELS)
def test_a_requests_pieces_are_all_of_its_kv_and_overlap_nowhere(
    model: str, arrangement: str
) -> None:
    request = Request(model, tokens=500, page_size=64, tp_size=1, arrangement=arrangement)
    moved = kv_transfer(request, "read", 300 * MIB, seed=1)
    assert moved.nbytes == 8 * 64 * MODELS[model].token_bytes(1)  # 500 tokens are 8 pages
    for side in (moved.local, moved.remote):
        order = np.argsort(side)
        assert (side[order][1:] >= (side + moved.lengths)[order][:-1]).all()
        assert int((side + moved.lengths).max()) <= 300 * MIB
    assert not np.array_equal(moved.local, moved.remote)  # each side has its own churn


def test_tokens_of_the_presets_have_the_bytes_that_the_models_have() -> None:
    assert {name: model.token_bytes(1) for name, model in MODELS.items()} == {
        "llama-3-8b": 128 << 10,
        "qwen3-32b": 256 << 10,
        "deepseek-v3": 61 * 576 * 2,
    }
    assert MODELS["llama-3-8b"].token_bytes(4) == 32 << 10
    assert MODELS["llama-3-8b"].token_bytes(16) == 16 << 10  # 8 heads on 16 ranks, each twice
    assert MODELS["deepseek-v3"].token_bytes(8) == MODELS["deepseek-v3"].token_bytes(1)


def test_pieces_follow_the_arrangement() -> None:
    def pieces(arrangement: str) -> tuple[int, int]:
        moved = kv_transfer(Request("llama-3-8b", 64, 16, 1, arrangement), "read", 64 * MIB, 0)
        return len(moved.lengths), int(moved.lengths[0])

    whole = 16 * 8 * 256 * 2
    assert pieces("vllm") == (4 * 32, whole)
    assert pieces("sglang") == (4 * 32 * 2, whole // 2)
    assert pieces("heads") == (4 * 32 * 8, whole // 8)


def test_writing_is_reading_the_other_way_round() -> None:
    request = Request("deepseek-v3", 100, 16, 1, "vllm")
    read, write = (kv_transfer(request, op, 64 * MIB, 5) for op in ("read", "write"))
    assert np.array_equal(read.local, write.remote)
    assert np.array_equal(read.remote, write.local)


def test_a_request_that_the_buffer_cannot_hold_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"2048 tokens of qwen3-32b .* --total_buffer_size"):
        kv_transfer(Request("qwen3-32b", 2048, 16, 1, "vllm"), "read", 512 * MIB, 0)


def test_fragmentation_moves_the_same_bytes_at_every_page_size() -> None:
    options = Options(workload="fragmentation", model="deepseek-v3", tokens=512)
    rows = list(cases(options))
    assert [case.row.batch for case in rows] == [512 * 61 // size for size in PAGE_SIZES]
    assert {case.work[0][0].nbytes for case in rows} == {512 * 61 * 1152}


@pytest.mark.parametrize("contiguous", [False, True])
def test_threads_of_a_row_share_no_block(contiguous: bool) -> None:
    row = Row(block=64, batch=8, threads=3)
    moved = scattered(row, "read", 64 * 30, seed=7, contiguous=contiguous)
    assert len(moved) == 3
    for side in ("local", "remote"):
        starts = np.concatenate([getattr(one, side) for one in moved])
        assert len(np.unique(starts)) == 24
        assert int(starts.max()) + 64 <= 64 * 30
        assert (np.diff(starts.astype(np.int64)) == 64).all() == contiguous


def test_mix_reads_and_writes_the_same_blocks_in_turns() -> None:
    options = Options(op="mix", blocks=(4096, 4096), batches=(4, 4), threads=(2,))
    (case,) = cases(options)
    assert [[one.op for one in thread] for thread in case.work] == [["read", "write"]] * 2
    read, write = case.work[0]
    assert np.array_equal(read.local, write.local)


def test_a_skipped_row_has_nothing_to_run() -> None:
    options = Options(blocks=(4096, 8192), buffer=4096)
    runs, skipped = cases(options)
    assert runs.work
    assert (skipped.work, skipped.row.skipped) == ((), "needs 8192 of 4096 bytes")


def test_options_go_through_json() -> None:
    options = Options(op="mix", peers=("zmq",))
    assert msgspec.json.decode(msgspec.json.encode(options), type=Options) == options
