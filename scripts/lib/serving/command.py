"""`scripts/bench serving`: choose set-ups, measure them group by group, show and write."""

from __future__ import annotations

import importlib
import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from harness.completions import CompletionFailed
from harness.process import ServerFailed, end_like_ctrl_c
from mooncake_engine.transport.shm.arena import available_bytes
from rich.console import Console

from serving import groups, options, report, urls, verdict, vllm_overlap
from serving.results import Result
from serving.setup import Place, Setup, SetupFailed
from serving.stage import Plan, run_group

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from serving.setup import Running

#: Whose transfers are looked at for overlap: where bytes take longest.
OVERLAPPING = "ours 1P1D, tcp"
PACKAGES = ("vllm", "sglang", "torch", "nixl", "mooncake-transfer-engine-non-cuda")


def chosen(all_of_them: Sequence[Setup], parts: Sequence[str]) -> list[Setup]:
    """Those whose names, less their commas, contain one of `parts`, and the reference.

    All, without `parts`.

    Raises:
        ValueError: A part is in no name.
    """
    for part in parts:
        if not any(part in _plain(setup) for setup in all_of_them):
            names = ", ".join(map(_plain, all_of_them))
            raise ValueError(f"--only: no set-up's name contains {part!r}; there are {names}")
    return [
        setup
        for setup in all_of_them
        if setup.kind == "aggregated" or not parts or any(part in _plain(setup) for part in parts)
    ]


def _plain(setup: Setup) -> str:
    return setup.name.replace(",", "")


def run(given: argparse.Namespace, console: Console) -> int:
    """Exit status: 0 when all that was asked for was measured and every token was right."""
    if given.url:
        found = _user_run(given)
        given.model = given.tokenizer or given.model
    else:
        found = importlib.import_module(f"serving.{given.framework}_setups").setups()
    setups = chosen(found, options.wanted(given))
    if given.list:
        for setup in found:
            console.print(f"{setup.name}  [dim]{setup.needed}[/]", highlight=False)
        return 0
    plan = Plan(
        rounds=1 if given.quick else given.rounds,
        prompts=options.prompts_of(given),
        repeats=given.repeats,
        load=options.load_of(given),
    )
    result = Result(machine=machine(), versions=versions(), load=plan.load, prompts=plan.prompts)
    place = Place(given.model, given.logs, console)
    given.logs.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    parts = groups.grouped(setups, groups.capacity(available_bytes(), given.framework))
    try:
        _measure(parts, plan, place, result, begin + given.minutes * 60)
        _sglang_only(given, place, result)
    finally:  # Ctrl-C after an hour does not lose that hour
        if given.json:
            given.json.write_bytes(msgspec.json.format(msgspec.json.encode(result)))
    report.show(result, console)
    console.print(f"{(time.monotonic() - begin) / 60:.0f} minutes")
    measured = [verdict.summary(row) for row in result.rows if row.rounds]
    good = measured and all(each.rounds and each.equal == each.asked for each in measured)
    return 0 if good else 1


def _user_run(given: argparse.Namespace) -> tuple[Setup, ...]:
    """SGLang's are asked in its own API, which takes both legs at once."""
    if given.framework == "vllm":
        return urls.setups(given.url, given.legs, given.served_model)
    from serving.sglang_setups import user_run

    return user_run(given.url, given.legs)


def _measure(
    parts: list[list[Setup]], plan: Plan, place: Place, result: Result, until: float
) -> None:
    for number, group in enumerate(parts, 1):
        # What is left is shared out among the groups that are left.
        begin = time.monotonic()
        end = begin + (until - begin) / (len(parts) - number + 1)
        names = ", ".join(setup.name for setup in group)
        place.console.print(f"group {number} of {len(parts)}: {names}", highlight=False)

        def overlap(up: dict[str, Running]) -> None:
            pair = up.get(OVERLAPPING)
            if plan.rounds > 1 and pair and pair.hand_at_once:
                result.overlap += vllm_overlap.measure(pair)

        result.rows += run_group(group, plan, place, number, end, overlap)


def _sglang_only(given: argparse.Namespace, place: Place, result: Result) -> None:
    """What has set-ups of its own: small chunks, and two sizes of page."""
    if given.framework != "sglang" or given.quick or given.only or given.url:
        return
    overlap = importlib.import_module("serving.sglang_overlap")
    pages = importlib.import_module("serving.sglang_pages")
    try:
        result.overlap += overlap.measure(place)
        result.pages += pages.measure(place, pages.loads())
    except (SetupFailed, ServerFailed, CompletionFailed) as failed:
        place.console.print(f"overlap or page sizes: {failed}", markup=False)


def machine() -> dict[str, str]:
    """What the figures were taken on."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return {
        "cpu": cpu,
        "cores": str(len(os.sched_getaffinity(0))),
        "memory_GiB": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f}",
        "kernel": platform.release(),
    }


def versions() -> dict[str, str]:
    """Of what takes part, as far as this environment has it."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def main() -> int:
    """Parse the command line, and end in order whatever happens."""
    parser = options.parser()
    given = parser.parse_args()
    end_like_ctrl_c()
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        return run(given, console)
    except ValueError as wrong:
        parser.error(str(wrong))
    except (ServerFailed, SetupFailed) as failed:
        console.print(str(failed), markup=False, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("stopped; every server has ended")
        return 130


if __name__ == "__main__":
    sys.exit(main())
