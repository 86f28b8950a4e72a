"""`python -m sglang.bench_serving`, SGLang's own benchmark, on random token ids."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

from harness.process import ServerFailed

if TYPE_CHECKING:
    from pathlib import Path

PROMPTS, CONCURRENCY = 8, 2
INPUT_TOKENS, OUTPUT_TOKENS = 300, 16
TIMEOUT_S = 600.0  # ten seconds on two quiet cores, nearly all of it imports
# Name in the table -> key in the result file, in milliseconds.
FIGURES = {
    "mean TTFT": "mean_ttft_ms",
    "median TTFT": "median_ttft_ms",
    "mean ITL": "mean_itl_ms",
    "median ITL": "median_itl_ms",
}


def run(url: str, name: str, logs: Path, model: Path, *, disaggregated: bool) -> dict[str, float]:
    """One run against the server or router at `url`; `FIGURES` by their names.

    Raises:
        ServerFailed: It or one of its requests ended badly, or took 600 s; its log is named.
    """
    result, log = logs / f"bench-{name}.jsonl", logs / f"bench-{name}.log"
    result.unlink(missing_ok=True)  # it appends
    command = [sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang"]
    command += ["--base-url", url, "--model", str(model), "--tokenizer", str(model)]
    command += ["--dataset-name", "random-ids", "--tokenize-prompt", "--random-range-ratio", "1.0"]
    command += ["--random-input-len", str(INPUT_TOKENS)]
    command += ["--random-output-len", str(OUTPUT_TOKENS)]
    command += ["--num-prompts", str(PROMPTS), "--max-concurrency", str(CONCURRENCY)]
    command += ["--warmup-requests", "1", "--disable-tqdm", "--output-file", str(result)]
    if disaggregated:
        command.append("--pd-separated")
    with log.open("wb") as output:
        try:
            done = subprocess.run(
                command, stdout=output, stderr=output, timeout=TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired as late:
            raise ServerFailed(f"sglang.bench_serving took {TIMEOUT_S:.0f} s; see {log}") from late
    if done.returncode:
        raise ServerFailed(f"sglang.bench_serving ended with status {done.returncode}; see {log}")
    figures = json.loads(result.read_text())
    if figures["completed"] != PROMPTS:
        raise ServerFailed(f"{figures['completed']} of {PROMPTS} requests succeeded; see {log}")
    return {label: figures[key] for label, key in FIGURES.items()}
