"""The parts of SGLang's benchmark that need no SGLang: what is asked, what is read, and errors."""

from __future__ import annotations

import contextlib
import itertools
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from harness.process import ServerFailed
from harness.sglang import BACKEND
from serving.overlap import taken
from serving.setup import (
    PAGE_SIZE,
    Exchange,
    Load,
    LoadFigures,
    Running,
    SetupFailed,
    Spread,
    settled,
)
from serving.sglang_load import command, figures
from serving.sglang_overlap import CHUNK, PROMPTS
from serving.sglang_pages import Pages, loads, one, table
from serving.sglang_servers import STOCK, Plan
from serving.sglang_setups import setups
from serving.sglang_timers import OF_DECODE, OF_PREFILL, timing, totals

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness.completions import Reply

LOAD = Load(requests=8, rate=0.5, input_tokens=2048, output_tokens=32, seed=3)


def test_the_load_is_sglangs_own_benchmark_at_a_rate_and_with_a_seed() -> None:
    line = command(LOAD, "http://h:1", Path("/m"), disaggregated=True)
    options = dict(itertools.pairwise(line))
    assert line[1:3] == ["-m", "sglang.bench_serving"]
    assert options["--base-url"] == "http://h:1"
    assert options["--request-rate"] == "0.5"
    assert options["--seed"] == "3"
    assert options["--num-prompts"] == "8"
    assert (options["--random-input-len"], options["--random-output-len"]) == ("2048", "32")
    assert "--pd-separated" in line
    assert "--pd-separated" not in command(LOAD, "http://h:1", Path("/m"), disaggregated=False)


def test_figures_are_the_benchmarks_means_medians_and_99th_percentiles() -> None:
    said = {"output_throughput": 55.5}
    for number, what in enumerate(("ttft", "tpot", "itl")):
        for key in ("mean", "median", "p90", "p99"):
            said[f"{key}_{what}_ms"] = 100.0 * number + len(key)
    assert figures(said) == LoadFigures(
        output_tokens_s=55.5,
        ttft=Spread(4.0, 6.0, 3.0),
        tpot=Spread(104.0, 106.0, 103.0),
        itl=Spread(204.0, 206.0, 203.0),
    )


def test_set_ups_are_compared_on_one_path_and_each_says_what_a_cpu_needed() -> None:
    found = {setup.name: setup for setup in setups()}
    assert [setup.kind for setup in found.values()].count("aggregated") == 1
    peer = found["mooncake_tcp 1P1D"]
    assert (peer.kind, peer.route) == ("peer", "tcp")
    assert "sglang_on_cpu.py" in peer.needed
    assert found["ours 1P1D, tcp"].route == peer.route
    assert found["ours 1P1D, shm"].route == "same host"
    assert all(setup.needed for setup in found.values() if setup.kind in ("ours", "peer"))
    assert {setup.route for setup in found.values() if setup.kind == "regular"} == {""}


def test_a_plan_of_ours_takes_one_path_only_and_a_stock_one_another_launcher(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ours = Plan(protocol="shm", page_size=1, chunk=128)
    assert ours.backend == BACKEND
    assert ours.launcher() == []
    assert ours.settings() == {"engine": {"protocol": "shm", "strict_transport": True}}
    flags = ours.flags()
    assert flags[flags.index("--page-size") + 1] == "1"
    assert flags[flags.index("--chunked-prefill-size") + 1] == "128"
    assert "--disable-overlap-schedule" in flags
    assert not {"--chunked-prefill-size", "--disable-overlap-schedule"} & set(Plan().flags())

    nowhere = tmp_path / ".venv-sglang-peers" / "bin" / "python"
    monkeypatch.setattr("serving.sglang_servers.PEERS", nowhere)
    with pytest.raises(SetupFailed, match=r"mooncake-transfer-engine-non-cuda in .*-peers"):
        Plan(backend=STOCK).launcher()


def test_an_environment_without_mooncake_is_told_with_what_python_printed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'libetcd: not found' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr("serving.sglang_servers.PEERS", python)
    with pytest.raises(SetupFailed, match=r"import mooncake\.engine' said: libetcd: not found"):
        Plan(backend=STOCK).launcher()


PREFILL_PAGE = """\
# TYPE sglang:kv_transfer_latency_ms histogram
sglang:kv_transfer_latency_ms_sum{tp_rank="0"} 165.0
sglang:kv_transfer_latency_ms_count{tp_rank="0"} 5.0
sglang:kv_transfer_latency_ms_sum{tp_rank="1"} 35.0
sglang:kv_transfer_latency_ms_count{tp_rank="1"} 5.0
# TYPE sglang:kv_transfer_total_mb histogram
sglang:kv_transfer_total_mb_sum{tp_rank="0"} 2.0
# TYPE sglang:per_stage_req_latency_seconds histogram
sglang:per_stage_req_latency_seconds_sum{stage="prefill_forward"} 9.0
sglang:per_stage_req_latency_seconds_sum{stage="prefill_transfer_kv_cache"} 0.25
sglang:per_stage_req_latency_seconds_count{stage="prefill_transfer_kv_cache"} 5.0
"""


def test_sglangs_timers_are_summed_over_ranks_and_in_seconds_and_bytes() -> None:
    found = totals(PREFILL_PAGE, OF_PREFILL)
    assert found["sglang_seconds"] == pytest.approx(0.2)
    assert found["sglang_requests"] == 10
    assert found["sglang_bytes"] == 2 << 20


def test_only_what_a_request_waits_for_behind_its_last_chunk_is_exposed() -> None:
    assert totals(PREFILL_PAGE, OF_PREFILL)["exposed_seconds"] == 0.25


def test_a_server_that_has_moved_nothing_has_zeros() -> None:
    assert set(totals("", OF_DECODE).values()) == {0.0}


def test_counts_are_read_until_two_looks_agree() -> None:
    looks = iter([{"bytes": 1.0}, {"bytes": 2.0}, {"bytes": 2.0}, {"bytes": 3.0}])
    assert settled(lambda: next(looks), clock=lambda: 0.0, sleep=lambda _: None) == {"bytes": 2.0}


def test_counts_that_never_settle_end_with_the_last_look() -> None:
    time, looks = [0.0], iter(range(1000))

    def sleep(seconds: float) -> None:
        time[0] += seconds

    found = settled(lambda: {"bytes": float(next(looks))}, clock=lambda: time[0], sleep=sleep)
    assert 5 < found["bytes"] < 12
    assert time[0] < 12


def test_prompts_of_the_overlap_are_whole_pages_in_three_chunks() -> None:
    assert CHUNK % PAGE_SIZE == 0
    for tokens in PROMPTS.values():
        assert tokens % PAGE_SIZE == 0
        assert -(-tokens // CHUNK) == 3


def test_what_is_not_waited_for_is_hidden() -> None:
    seconds, sent = [0.0], []

    def send(prompt: list[int]) -> None:
        sent.append(tuple(prompt))
        seconds.append(seconds[-1] + len(sent))  # 1, 2, 3, ... seconds for one after the other

    def timers() -> dict[str, float]:
        return {"seconds": seconds[-1], "exposed_seconds": seconds[-1] / 4}

    found = taken("", 65, 64, timers, send)
    assert (found.transfer_ms, found.exposed_ms, found.hidden) == (3000, 750, 0.75)
    assert found.last_chunk == 1 / 65
    assert {len(prompt) for prompt in sent} == {65}
    assert len(set(sent)) == len(sent)  # no prefix cache has seen them


def test_a_row_that_did_not_start_stands_in_the_table_of_page_sizes() -> None:
    failed = Pages(engine=STOCK, page_size=1, error="pip said no")
    spread = Spread(1.0, 2.0, 3.0)
    run = LoadFigures(output_tokens_s=9.0, ttft=spread, tpot=spread, itl=spread)
    shown = table([failed, Pages(engine="ours", page_size=64, run=1, load=run, gb_s=2.0)])
    assert shown.row_count == 2
    assert [load.seed for load in loads()] == [1, 2]


@contextlib.contextmanager
def metrics(page: str) -> Iterator[str]:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, *_: object) -> None:
            """Keep pytest's output readable."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as listening:
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()
        thread.join()


DECODE_PAGE = """\
# TYPE mooncake_connector:transfer_seconds histogram
mooncake_connector:transfer_seconds_sum 0.125
mooncake_connector:transfer_seconds_count 10.0
"""


def test_ours_is_timed_by_its_own_reads_and_a_peer_by_what_sglang_says_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("serving.setup.SETTLED_S", 0.0)
    with metrics(PREFILL_PAGE) as prefill, metrics(DECODE_PAGE) as decode:
        ours = timing(prefill, decode, ours=True)()
        peers = timing(prefill, decode, ours=False)()
    assert (ours["seconds"], ours["batches"]) == (0.125, 10)
    assert peers["seconds"] == peers["sglang_seconds"] == pytest.approx(0.2)
    assert (peers["bytes"], peers["batches"]) == (2 << 20, 10)


def test_a_load_that_a_pair_does_not_survive_is_a_row_that_failed(tmp_path: Path) -> None:
    def load(_load: Load, file: Path) -> LoadFigures:
        raise ServerFailed(f"3 of 8 requests succeeded; see {file}")

    def ask(_prompt: list[int], _tokens: int) -> Reply:
        raise AssertionError("the load is not single requests")

    def hand(_prompt: list[int], _tokens: int) -> Exchange:
        raise AssertionError("single requests come after a load that was survived")

    running = Running(url="http://h:1", ask=ask, hand=hand, load=load)
    row = one(running, LOAD, tmp_path / "a.json", Pages(engine=STOCK, page_size=1, run=2))
    assert (row.engine, row.page_size, row.run, row.load) == (STOCK, 1, 2, None)
    assert "3 of 8 requests succeeded" in row.error
