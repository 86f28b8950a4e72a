"""`scripts/demo`: one aggregated server beside one prefill/decode pair, token by token."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import demo_sglang
import demo_vllm
import msgspec
from harness.comparison import Row, Stage, compare, prompts, table
from harness.process import ServerFailed, end_like_ctrl_c
from rich.console import Console

if TYPE_CHECKING:
    from contextlib import AbstractContextManager


class Opened(Protocol):
    """How a framework's servers are started."""

    def __call__(
        self, logs: Path, model: Path, transport: str, console: Console
    ) -> AbstractContextManager[Stage]:
        """All of them up inside the context."""


class Benchmark(Protocol):
    """A benchmark of the framework's own."""

    def __call__(self, stage: Stage, logs: Path, model: Path, console: Console) -> None:
        """Run it and print."""


@dataclass(frozen=True)
class Framework:
    """One framework's part of the demo; `lengths` in tokens."""

    opened: Opened
    lengths: tuple[int, ...]
    benchmark: Benchmark | None = None


FRAMEWORKS = {
    "vllm": Framework(demo_vllm.opened, demo_vllm.LENGTHS),  # scripts/bench measures more
    "sglang": Framework(demo_sglang.opened, demo_sglang.LENGTHS, demo_sglang.benchmark),
}


class Result(msgspec.Struct, frozen=True):
    """What `--json` writes."""

    prompts: int
    identical: int
    path: str
    rows: list[Row]


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Exit status: 0 when every token is the same and KV was moved."""
    framework = FRAMEWORKS[arguments.framework]
    folders = arguments.logs, arguments.model
    rows: list[Row] = []
    with framework.opened(*folders, arguments.transport, console) as stage:
        named = prompts(framework.lengths)
        with console.status("") as status:
            for number, (name, prompt) in enumerate(named.items(), 1):
                status.update(f"prompt {number} of {len(named)}: {name}")
                rows.append(compare(stage, name, prompt))
        result = summary(rows)
        console.print(table(rows))
        console.print(
            f"{result.identical} of {len(rows)} prompts gave the aggregated server's tokens; "
            f"KV moved over {result.path}"
        )
        if arguments.json:
            arguments.json.write_bytes(msgspec.json.format(msgspec.json.encode(result)))
        if framework.benchmark is not None:
            framework.benchmark(stage, *folders, console)
        console.print("stopping the servers")
    if result.path == "-":
        console.print("[bold red]no KV cache was moved: decode computed everything itself[/]")
        return 1
    return 0 if result.identical == len(rows) else 1


def summary(rows: list[Row]) -> Result:
    """The rows and what they come to."""
    paths = sorted({row.path for row in rows} - {"-"})
    return Result(len(rows), sum(row.equal for row in rows), "+".join(paths) or "-", rows)


def main() -> int:
    """Parse the command line, and end in order whatever happens."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument("--framework", choices=tuple(FRAMEWORKS), default="vllm")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
    parser.add_argument("--transport", choices=("auto", "tcp", "shm"), default="auto")
    parser.add_argument("--model", type=Path, required=True, help="folder of the tiny model")
    parser.add_argument("--logs", type=Path, required=True, help="folder for the servers' logs")
    arguments = parser.parse_args()
    end_like_ctrl_c()
    console = Console(width=None if sys.stdout.isatty() else 110)
    try:
        return run(arguments, console)
    except ServerFailed as failed:
        console.print(str(failed), markup=False, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("stopped; every server has ended")
        return 130


if __name__ == "__main__":
    sys.exit(main())
