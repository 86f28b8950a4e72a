"""`python -m sglang.bench_serving`, SGLang's own benchmark, at a rate of requests."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from harness.process import ServerFailed

from serving.setup import LoadFigures, Spread

if TYPE_CHECKING:
    from pathlib import Path

    from serving.setup import Load, RunLoad

TIMEOUT_S = 1200.0


def loading(url: str, model: Path, *, disaggregated: bool) -> RunLoad:
    """Runs against `url`; the log and the result lie beside the file that `RunLoad` is given."""

    def run(load: Load, file: Path) -> LoadFigures:
        result, log = file.with_suffix(".jsonl"), file.with_suffix(".log")
        result.unlink(missing_ok=True)  # it appends
        line = [
            *command(load, url, model, disaggregated=disaggregated),
            "--output-file",
            str(result),
        ]
        with log.open("wb") as output:
            try:
                done = subprocess.run(
                    line, stdout=output, stderr=output, timeout=TIMEOUT_S, check=False
                )
            except subprocess.TimeoutExpired as late:
                raise ServerFailed(
                    f"sglang.bench_serving took {TIMEOUT_S:.0f} s; see {log}"
                ) from late
        if done.returncode:
            raise ServerFailed(
                f"sglang.bench_serving ended with status {done.returncode}; see {log}"
            )
        said = json.loads(result.read_text())
        if said["completed"] != load.requests:
            raise ServerFailed(
                f"{said['completed']} of {load.requests} requests of sglang.bench_serving "
                f"succeeded; see {log}"
            )
        return figures(said)

    return run


def command(load: Load, url: str, model: Path, *, disaggregated: bool) -> list[str]:
    """The command line, but for the file of the result."""
    line = [sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang"]
    line += ["--base-url", url, "--model", str(model), "--tokenizer", str(model)]
    # `random` would download a corpus; token ids, since text would be as long as it happens to be
    line += ["--dataset-name", "random-ids", "--tokenize-prompt", "--random-range-ratio", "1.0"]
    line += ["--random-input-len", str(load.input_tokens)]
    line += ["--random-output-len", str(load.output_tokens)]
    line += ["--num-prompts", str(load.requests), "--request-rate", f"{load.rate:g}"]
    line += ["--seed", str(load.seed), "--warmup-requests", "0", "--disable-tqdm"]
    if disaggregated:
        line.append("--pd-separated")
    return line


def figures(said: dict[str, Any]) -> LoadFigures:
    """What we show of one result."""

    def spread(what: str) -> Spread:
        return Spread(*(said[f"{key}_{what}_ms"] for key in ("mean", "median", "p99")))

    return LoadFigures(
        output_tokens_s=said["output_throughput"],
        ttft=spread("ttft"),
        tpot=spread("tpot"),
        itl=spread("itl"),
    )
