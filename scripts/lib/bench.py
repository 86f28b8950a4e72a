"""`scripts/bench`: `vllm bench serve` against both set-ups in turns, medians and their ratio.

In turns and in one run, because two runs on a shared machine compare the machine's other load.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from demo_vllm import opened
from harness.completions import MODEL
from harness.process import ServerFailed, end_like_ctrl_c
from rich.console import Console
from rich.table import Table

# Name in the table -> key in vLLM's result file, in milliseconds.
FIGURES = {"TTFT": "median_ttft_ms", "ITL": "median_itl_ms", "end to end": "median_e2el_ms"}
ROUND_TIMEOUT_S = 1200.0


class BenchFailed(RuntimeError):
    """`vllm bench serve` ended badly, or some of its requests did."""


def one_round(url: str, number: int, name: str, options: argparse.Namespace) -> dict[str, float]:
    """One run of `vllm bench serve`; the medians of `FIGURES`."""
    result = options.logs / f"{name}-{number}.json"
    log = options.logs / f"{name}-{number}.log"
    command = [
        *(str(Path(sys.executable).parent / "vllm"), "bench", "serve", "--backend", "openai"),
        *("--base-url", url, "--endpoint", "/v1/completions"),
        *("--model", MODEL, "--tokenizer", str(options.model)),
        *("--dataset-name", "random", "--random-input-len", str(options.input_len)),
        *("--random-output-len", str(options.output_len), "--num-prompts", str(options.prompts)),
        # another seed per round, else the second round meets the first one's prefix cache
        *("--max-concurrency", str(options.concurrency), "--ignore-eos", "--seed", str(number)),
        *("--percentile-metrics", "ttft,tpot,itl,e2el", "--save-result"),
        *("--result-dir", str(result.parent), "--result-filename", result.name),
    ]
    with log.open("w") as output:
        done = subprocess.run(
            command, stdout=output, stderr=output, timeout=ROUND_TIMEOUT_S, check=False
        )
    if done.returncode:
        raise BenchFailed(f"vllm bench serve ended with status {done.returncode}; see {log}")
    figures = json.loads(result.read_text())
    if figures["completed"] != options.prompts:
        raise BenchFailed(f"{figures['completed']} of {options.prompts} requests succeeded: {log}")
    return {label: figures[key] for label, key in FIGURES.items()}


def run(options: argparse.Namespace, console: Console) -> None:
    """Both set-ups, `--rounds` times, and the table."""
    rounds: dict[str, list[dict[str, float]]] = {"aggregated": [], "disaggregated": []}
    with opened(options.logs, options.model, options.transport, console) as stage:
        urls = {"aggregated": stage.aggregated.url, "disaggregated": stage.router.url}
        for number in range(options.rounds):
            for name, url in urls.items():
                with console.status(f"round {number + 1} of {options.rounds}: {name}"):
                    rounds[name].append(one_round(url, number, name, options))
                console.print(f"round {number + 1} of {options.rounds}: {name} done")
        console.print("stopping the servers")
    table = Table("median, ms", *rounds, "ratio", caption=f"medians of {options.rounds} rounds")
    medians = {
        label: {name: statistics.median(r[label] for r in taken) for name, taken in rounds.items()}
        for label in FIGURES
    }
    for label, by_name in medians.items():
        shown = [f"{value:.1f}" for value in by_name.values()]
        table.add_row(label, *shown, f"{by_name['disaggregated'] / by_name['aggregated']:.2f}")
    console.print(table)
    if options.json:
        options.json.write_text(json.dumps({"medians": medians, "rounds": rounds}, indent=2))


def main() -> int:
    """Parse the command line, and end in order whatever happens."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=16, help="requests a round")
    parser.add_argument("--concurrency", type=int, default=2)
    parser.add_argument("--input-len", type=int, default=200, help="tokens")
    parser.add_argument("--output-len", type=int, default=16, help="tokens")
    parser.add_argument("--transport", choices=("auto", "tcp", "shm"), default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rounds as JSON")
    parser.add_argument("--model", type=Path, required=True, help="folder of the tiny model")
    parser.add_argument("--logs", type=Path, required=True, help="folder for logs and results")
    options = parser.parse_args()
    end_like_ctrl_c()
    console = Console(width=None if sys.stdout.isatty() else 110)
    try:
        run(options, console)
    except (ServerFailed, BenchFailed, subprocess.TimeoutExpired) as failed:
        console.print(str(failed), markup=False, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("stopped; every server has ended")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
