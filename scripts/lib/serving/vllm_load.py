"""`vllm bench serve`: one run, and its figures."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from harness.completions import MODEL
from harness.process import ServerFailed

from serving.setup import LoadFigures, Spread

if TYPE_CHECKING:
    from pathlib import Path

    from serving.setup import Load

TIMEOUT_S = 900.0


def run(url: str, tokenizer: str, load: Load, result: Path, model: str = MODEL) -> LoadFigures:
    """One run against `url`; writes `result` and a log beside it.

    Raises:
        ServerFailed: It, or one of its requests, ended badly, or it took 15 minutes.
    """
    log = result.with_suffix(".log")
    with log.open("w") as output:
        try:
            done = subprocess.run(
                command(url, tokenizer, load, result, model),
                stdout=output,
                stderr=output,
                timeout=TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as late:
            raise ServerFailed(f"vllm bench serve took {TIMEOUT_S:.0f} s; see {log}") from late
    if done.returncode:
        raise ServerFailed(f"vllm bench serve ended with status {done.returncode}; see {log}")
    said: dict[str, Any] = json.loads(result.read_text())
    if said["completed"] != load.requests:
        raise ServerFailed(f"{said['completed']} of {load.requests} requests succeeded; see {log}")
    return figures(said)


def command(url: str, tokenizer: str, load: Load, result: Path, model: str) -> list[str]:
    """The command line; `sys.executable` is the environment with vLLM."""
    return [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve"),
        *("--backend", "openai", "--base-url", url, "--endpoint", "/v1/completions"),
        *("--model", model, "--tokenizer", tokenizer),
        *("--dataset-name", "random", "--random-input-len", str(load.input_tokens)),
        *("--random-output-len", str(load.output_tokens), "--num-prompts", str(load.requests)),
        *("--request-rate", str(load.rate), "--ignore-eos", "--seed", str(load.seed)),
        *("--percentile-metrics", "ttft,tpot,itl", "--metric-percentiles", "50,99"),
        *("--disable-tqdm", "--save-result"),
        *("--result-dir", str(result.parent), "--result-filename", result.name),
    ]


def figures(said: dict[str, Any]) -> LoadFigures:
    """Of the result file."""
    spreads = {
        name: Spread(said[f"mean_{name}_ms"], said[f"p50_{name}_ms"], said[f"p99_{name}_ms"])
        for name in ("ttft", "tpot", "itl")
    }
    return LoadFigures(output_tokens_s=said["output_throughput"], **spreads)
