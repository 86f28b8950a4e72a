"""Runs what `bench transfer` was asked for, row by row, and writes it down."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import typer
from mooncake_engine.errors import ConfigError
from rich.console import Console

from mooncake_connector.bench import plot
from mooncake_connector.bench.conditions import Condition, Workload
from mooncake_connector.bench.lineup import lineup
from mooncake_connector.bench.options import Mode
from mooncake_connector.bench.remote import TargetServer
from mooncake_connector.bench.report import columns, heading, text
from mooncake_connector.bench.results import Result, blank_lines, filled, row_name
from mooncake_connector.bench.rounds import Pairs, Plan, run_rounds
from mooncake_connector.bench.workloads import cases

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mooncake_connector.bench.lineup import Lineup
    from mooncake_connector.bench.options import Options
    from mooncake_connector.bench.report import Column, Line
    from mooncake_connector.bench.turns import Failure, Outcome, Turn
    from mooncake_connector.bench.workloads import Case

#: As tebench; a shorter turn, of somebody who only tries, has a warm-up as short.
WARM_UP_S = 1.0


def run(options: Options) -> None:
    """Serve as a target until Ctrl-C, or measure every row.

    Raises:
        ConfigError: It cannot run as asked; nothing was measured.
        typer.Exit: Code 1: our engine failed in a row, which standard error has told.
    """
    if options.mode is Mode.TARGET:
        _serve(options)
        return
    if options.plot:
        plot.check_can_plot()
    run_of_all = _Run(options, lineup(options), list(cases(options)))
    logs = Path(tempfile.mkdtemp(prefix="mooncake-bench-"))
    try:
        run_of_all.measure(logs)
    finally:
        if not run_of_all.failures:  # their texts name the logs
            shutil.rmtree(logs)
        run_of_all.write()
    if any(failure.variant == run_of_all.lineup.ours.name for failure in run_of_all.failures):
        raise typer.Exit(1)


def _serve(options: Options) -> None:
    host, port = _host_and_port(options.seg_name)
    own = {"device_name": ",".join(options.devices)} if options.devices else {}
    try:
        server = TargetServer(host, port, own)
    except OSError as error:
        raise ConfigError(
            f"cannot listen at {host}:{port}: {error.strerror}; name another --seg_name"
        ) from error
    with server:
        # Set and not left to KeyboardInterrupt: a shell starts what is in the background with
        # SIGINT ignored.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: server.stop())
        typer.echo(
            "To start initiators, run mooncake-connector bench transfer "
            f"--target_seg_name={server.address} --protocol={options.protocol}"
        )
        sys.stdout.flush()  # who started us with a pipe waits for this line
        server.serve(typer.echo)


def _host_and_port(name: str) -> tuple[str, int]:
    host, colon, port = name.rpartition(":")
    if colon and port.isdecimal() and (":" not in host or host.startswith("[")):
        return host.strip("[]"), int(port)
    return name.strip("[]"), 0


class _Run:
    """What is known of the rows so far."""

    def __init__(self, options: Options, lineup: Lineup, rows: list[Case]) -> None:
        self.lineup = lineup
        self.failures: list[Failure] = []
        self._options = options
        self._rows = rows
        self._lines: list[Line] = []
        self._turns: list[Turn] = []
        self._notices: list[str] = []
        self._started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._deadline = time.monotonic() + 60 * options.minutes

    def measure(self, logs: Path) -> None:
        """Every row in turn; lines are printed as they are known."""
        blanks = [blank_lines(case, self._options.op, self.lineup) for case in self._rows]
        shown = columns([line for row in blanks for line in row], peers=bool(self.lineup.others))
        if self.lineup.no_limit:
            self._say(self.lineup.no_limit)
        typer.echo(heading(shown))
        workloads = [self._workload(case) for case in self._rows]
        nbytes = max((one.buffer_bytes for one in workloads if one.work), default=0)
        with Pairs(nbytes, logs, self._options.target_seg_name) as pairs:
            for index, (lines, workload) in enumerate(zip(blanks, workloads, strict=True)):
                if workload.work:
                    outcome = self._rounds(pairs, workload, len(self._rows) - index)
                    lines = filled(lines, workload.name, outcome, self.lineup)
                self._lines += lines
                _print(lines, shown)
                if self.lineup.ours.name in {failure.variant for failure in self.failures}:
                    return  # the next row would fail alike

    def write(self) -> None:
        """What was asked for as files."""
        options = self._options
        if options.json:
            result = Result(
                command=[Path(sys.argv[0]).name, *sys.argv[1:]],
                version=metadata.version("mooncake-connector"),
                started=self._started,
                machine=_machine(),
                options=options,
                lines=tuple(self._lines),
                turns=tuple(self._turns),
                failures=tuple(self.failures),
                notices=tuple(self._notices),
            )
            Path(options.json).write_bytes(msgspec.json.format(msgspec.json.encode(result)))
        if options.plot and any(line.figures for line in self._lines):
            title = f"{options.workload}, {options.op} over {options.protocol}"
            plot.plot(self._lines, Path(options.plot), title)

    def _workload(self, case: Case) -> Workload:
        options = self._options
        return Workload(
            name=row_name(case, options.op),
            work=case.work,
            condition=Condition(busy_python=options.busy_python, busy_loops=options.busy_loops),
        )

    def _rounds(self, pairs: Pairs, workload: Workload, rows_left: int) -> Outcome:
        plan = Plan(
            rounds=self._options.rounds or 1,
            at_most=0 if self._options.rounds else 1,
            limit_s=max(0.0, self._deadline - time.monotonic()) / rows_left,
            turn_s=self._options.duration,
            warm_up_s=min(WARM_UP_S, self._options.duration),
            retakes=2 if self._options.rounds else 0,
            check=self._options.check_consistency,
        )
        with _status(workload.name) as tell:
            outcome = run_rounds(pairs, self.lineup.variants, (workload,), plan, tell)
        self._turns += outcome.turns
        self.failures += outcome.failures
        for failure in outcome.failures:
            typer.echo(failure.text, err=True)
        if self._options.rounds:
            self._say(f"{workload.name}: ended after {outcome.ended}")
        return outcome

    def _say(self, notice: str) -> None:
        self._notices.append(notice)
        typer.echo(notice, err=True)


@contextlib.contextmanager
def _status(row: str) -> Iterator[Callable[[Turn | Failure], None]]:
    """On a terminal, a line that says what was measured last."""
    with Console(stderr=True).status(row) as status:

        def tell(latest: Turn | Failure) -> None:
            status.update(f"{row}: {latest.variant} done")

        yield tell


def _print(lines: list[Line], shown: list[Column]) -> None:
    console = Console(markup=False, highlight=False)
    for line in lines:
        style = "dim" if line.note or line.is_limit else ""
        console.print(text(line, shown), style=style, soft_wrap=True)


def _machine() -> dict[str, str]:
    facts = {"kernel": platform.release(), "cores": str(len(os.sched_getaffinity(0)))}
    for path, name, key in (
        ("/proc/cpuinfo", "model name", "processor"),
        ("/proc/meminfo", "MemTotal", "memory"),
    ):
        for line in Path(path).read_text().splitlines():
            if line.startswith(name):
                facts[key] = line.partition(":")[2].strip()
                break
    return facts
