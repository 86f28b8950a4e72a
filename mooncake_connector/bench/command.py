"""`mooncake-connector bench transfer`: its flags, and who does what with them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mooncake_connector.bench import options as asked
from mooncake_connector.bench.options import Options, checked

bench_app = typer.Typer(
    no_args_is_help=True, help="Measure the transfer engine beside the machine's limit and peers."
)

# An underscore is as good as a dash in every flag: tebench has the former.
_EITHER = {"token_normalize_func": lambda name: name.replace("_", "-")}
_CUDA = Path("/dev/nvidiactl")

_ROLE = "Who takes part"
_SWEEP = "The sweep"
_MEASURE = "How it is measured"
_REQUEST = "Requests: --workload kv or fragmentation"
_RESULT = "The result"


def _flag(*names: str, panel: str, help: str = "", least: int | None = None) -> Any:  # noqa: A002, ANN401 - typer's own name; what it returns is for typer alone
    return typer.Option(*names, rich_help_panel=panel, help=help, min=least)


@bench_app.command("transfer", context_settings=_EITHER)
def transfer(
    mode: Annotated[
        str, _flag("--mode", panel=_ROLE, help="target, initiator or both (default).")
    ] = "",
    target_seg_name: Annotated[
        str,
        _flag("--target_seg_name", "--segment_id", panel=_ROLE, help="HOST:PORT of a target."),
    ] = "",
    seg_name: Annotated[
        str,
        _flag(
            "--seg_name",
            "--local_server_name",
            panel=_ROLE,
            help="Target: HOST or HOST:PORT to listen on.",
        ),
    ] = "127.0.0.1",
    protocol: Annotated[str, _flag("--protocol", panel=_ROLE, help="tcp, shm or rdma.")] = "tcp",
    metadata_server: Annotated[
        str,
        _flag(
            "--metadata_server",
            "--metadata_url_list",
            panel=_ROLE,
            help="p2p, or etcd://HOST:PORT.",
        ),
    ] = "p2p",
    device_name: Annotated[
        str, _flag("--device_name", panel=_ROLE, help="RDMA devices, comma between.")
    ] = "",
    seg_type: Annotated[str, _flag("--seg_type", panel=_ROLE, help="DRAM.")] = "DRAM",
    workload: Annotated[
        str, _flag("--workload", panel=_MEASURE, help="sweep, kv or fragmentation.")
    ] = "sweep",
    op_type: Annotated[
        str,
        _flag("--op_type", "--operation", panel=_MEASURE, help="read, write or mix: in turns."),
    ] = "read",
    total_buffer_size: Annotated[
        str,
        _flag("--total_buffer_size", "--buffer_size", panel=_SWEEP, help="Of each side, at most."),
    ] = "1G",
    start_block_size: Annotated[str, _flag("--start_block_size", panel=_SWEEP)] = "4K",
    max_block_size: Annotated[str, _flag("--max_block_size", panel=_SWEEP)] = "64M",
    block_size: Annotated[
        str, _flag("--block_size", panel=_SWEEP, help="This one instead of several.")
    ] = "",
    start_batch_size: Annotated[int, _flag("--start_batch_size", panel=_SWEEP)] = 1,
    max_batch_size: Annotated[int, _flag("--max_batch_size", panel=_SWEEP)] = 1,
    batch_size: Annotated[
        str, _flag("--batch_size", panel=_SWEEP, help="This one instead of several.")
    ] = "",
    start_num_threads: Annotated[int, _flag("--start_num_threads", panel=_SWEEP)] = 1,
    max_num_threads: Annotated[
        int, _flag("--max_num_threads", panel=_SWEEP, help="By doubling.")
    ] = 1,
    threads: Annotated[
        str, _flag("--threads", panel=_SWEEP, help="These instead: 8, or 1,4,8,12.")
    ] = "",
    contiguous: Annotated[
        bool, _flag("--contiguous", panel=_SWEEP, help="A batch's blocks side by side.")
    ] = False,
    duration: Annotated[
        float, _flag("--duration", panel=_MEASURE, help="Seconds of a row in each round.")
    ] = 5.0,
    rounds: Annotated[
        int,
        _flag(
            "--rounds", least=0, panel=_MEASURE, help="Valid ones of a row; 0: one, valid or not."
        ),
    ] = 0,
    minutes: Annotated[
        float, _flag("--minutes", panel=_MEASURE, help="No round starts after that.")
    ] = 30.0,
    check_consistency: Annotated[
        bool,
        _flag("--check_consistency", panel=_MEASURE, help="Compare every byte before measuring."),
    ] = False,
    limits: Annotated[
        bool,
        _flag("--limits/--no-limits", panel=_MEASURE, help="Measure the machine's limit too."),
    ] = True,
    peers: Annotated[
        str,
        _flag("--peers", panel=_MEASURE, help="Of mooncake,nixl,ucx,zmq,gloo; all rows for each."),
    ] = "",
    busy_python: Annotated[
        bool, _flag("--busy_python", panel=_MEASURE, help="Pure Python runs in each side too.")
    ] = False,
    busy_loops: Annotated[
        int, _flag("--busy_loops", panel=_MEASURE, help="Processes that want a core each.")
    ] = 0,
    seed: Annotated[int, _flag("--seed", least=0, panel=_MEASURE, help="Of all places.")] = 0,
    model: Annotated[
        str, _flag("--model", panel=_REQUEST, help="llama-3-8b, qwen3-32b or deepseek-v3.")
    ] = "llama-3-8b",
    tokens: Annotated[int, _flag("--tokens", least=1, panel=_REQUEST)] = 2048,
    page_size: Annotated[
        int, _flag("--page_size", least=1, panel=_REQUEST, help="Tokens per page (kv).")
    ] = 16,
    tp_size: Annotated[
        int, _flag("--tp_size", least=1, panel=_REQUEST, help="One rank's share is moved.")
    ] = 1,
    kv_layout: Annotated[
        str, _flag("--kv_layout", panel=_REQUEST, help="vllm, sglang, or heads outside of pages.")
    ] = "vllm",
    json: Annotated[Path | None, _flag("--json", panel=_RESULT, help="Everything, too.")] = None,
    plot: Annotated[
        Path | None, _flag("--plot", panel=_RESULT, help="FILE.png, or FILE.html with the table.")
    ] = None,
) -> None:
    """Move blocks between two processes and say how fast, beside what the machine can do.

    Both sides on this machine, or a target here and an initiator there. Underscores and dashes
    are alike; sizes may be written as 4K, 1M, 2G.
    """
    asked.segment_type(seg_type, has_cuda=_CUDA.exists())
    blocks = asked.span(
        asked.size(block_size, "--block_size") if block_size else None,
        asked.size(start_block_size, "--start_block_size"),
        asked.size(max_block_size, "--max_block_size"),
        "block_size",
    )
    batches = asked.span(
        asked.size(batch_size, "--batch_size") if batch_size else None,
        start_batch_size,
        max_batch_size,
        "batch_size",
    )
    options = checked(
        Options(
            mode=asked.mode(mode, target_seg_name),
            workload=workload,
            seg_name=seg_name,
            target_seg_name=target_seg_name,
            op=op_type,
            protocol=protocol,
            metadata_server=asked.metadata_server(metadata_server),
            devices=asked.names(device_name),
            buffer=asked.size(total_buffer_size, "--total_buffer_size"),
            blocks=blocks,
            batches=batches,
            threads=asked.thread_counts(threads, start_num_threads, max_num_threads),
            duration=duration,
            rounds=rounds,
            minutes=minutes,
            contiguous=contiguous,
            check_consistency=check_consistency,
            limits=limits,
            peers=asked.names(peers),
            busy_python=busy_python,
            busy_loops=busy_loops,
            model=model,
            tokens=tokens,
            page_size=page_size,
            tp_size=tp_size,
            arrangement=kv_layout,
            seed=seed,
            json=str(json or ""),
            plot=str(plot or ""),
        )
    )
    # Here, so that `config check` need not wait for numpy's and the engine's parts.
    from mooncake_connector.bench.transfer import run

    run(options)
