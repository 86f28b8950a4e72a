from __future__ import annotations

import pytest
from mooncake_engine.errors import ConfigError

from mooncake_connector.bench import options
from mooncake_connector.bench.options import Mode, Options, checked


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4096", 4096), ("4K", 4096), ("1M", 1 << 20), ("2g", 2 << 30), ("1MiB", 1 << 20)],
)
def test_sizes_have_suffixes_of_1024(text: str, expected: int) -> None:
    assert options.size(text, "--x") == expected


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5M", "1T", "M"])
def test_what_is_no_size_is_refused_with_its_flag(text: str) -> None:
    with pytest.raises(ConfigError, match="--block_size="):
        options.size(text, "--block_size")


def test_threads_are_a_list_or_double_up_to_the_most() -> None:
    assert options.thread_counts("1,4,8,12", 1, 1) == (1, 4, 8, 12)
    assert options.thread_counts("", 1, 8) == (1, 2, 4, 8)
    with pytest.raises(ConfigError, match="--threads=1,x"):
        options.thread_counts("1,x", 1, 1)


def test_a_sweep_that_ends_before_it_starts_is_refused() -> None:
    assert options.span(None, 4, 16, "block_size") == (4, 16)
    assert options.span(8, 4, 16, "block_size") == (8, 8)
    with pytest.raises(ConfigError, match="--start_block_size=32 --max_block_size=16"):
        options.span(None, 32, 16, "block_size")


def test_who_names_a_target_is_its_initiator() -> None:
    assert options.mode("", "host:1") is Mode.INITIATOR
    assert options.mode("", "") is Mode.BOTH
    assert options.mode("target", "") is Mode.TARGET
    for asked, target in (("initiator", ""), ("target", "host:1"), ("both", "host:1")):
        with pytest.raises(ConfigError, match="--mode"):
            options.mode(asked, target)


def test_metadata_servers_are_peer_to_peer_or_etcd() -> None:
    known = {"P2PHANDSHAKE": "P2PHANDSHAKE", "p2p": "P2PHANDSHAKE", "": "P2PHANDSHAKE"}
    known |= {text: text for text in ("10.0.0.1:2379", "etcd://h:2379")}
    assert {text: options.metadata_server(text) for text in known} == known
    with pytest.raises(ConfigError, match="--metadata_server is 'redis://h:1'"):
        options.metadata_server("redis://h:1")


def test_memory_of_a_gpu_is_refused_in_one_sentence() -> None:
    options.segment_type("dram", has_cuda=False)
    with pytest.raises(ConfigError, match="no CUDA driver"):
        options.segment_type("VRAM", has_cuda=False)
    with pytest.raises(ConfigError, match="host memory only"):
        options.segment_type("VRAM", has_cuda=True)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (Options(op="readwrite"), "--op_type=readwrite"),
        (Options(protocol="nvlink"), "--protocol=nvlink"),
        (Options(peers=("uccl",)), "--peers=uccl"),
        (Options(workload="kv", threads=(1, 2)), "--threads"),
        (Options(duration=0), "--duration"),
        (Options(plot="a.pdf"), "--plot=a.pdf"),
    ],
)
def test_a_bad_value_is_refused_with_its_flag(given: Options, named: str) -> None:
    assert checked(Options())
    with pytest.raises(ConfigError, match=named):
        checked(given)
