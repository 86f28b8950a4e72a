"""The command line of `scripts/bench serving`."""

from __future__ import annotations

import argparse
from pathlib import Path

from serving.setup import PROMPTS, Load

QUICK_PROMPTS = (512, 2048)
QUICK_ONLY = ("ours 1P1D tcp",)


def parser() -> argparse.ArgumentParser:
    """All options and their defaults."""
    made = argparse.ArgumentParser(
        prog="scripts/bench serving",
        description="TTFT, ITL and handover of aggregated serving, our connector and the peers', "
        "under the same load, by turns.",
    )
    add = made.add_argument
    add("--framework", choices=("vllm", "sglang"), default="vllm")
    add(
        "--only",
        default="",
        metavar="A,B",
        help="set-ups whose names, without commas, contain "
        "one of these; the reference is always among them",
    )
    add("--quick", action="store_true", help="the reference and one pair of ours, one round")
    add("--rounds", type=_positive, default=5, help="turns of each set-up")
    add("--minutes", type=float, default=90.0, help="no round begins that would end later")
    add("--requests", type=_positive, default=12, help="of the load, in a turn")
    add("--rate", type=float, default=0.3, help="requests a second")
    add("--input-len", type=_positive, default=2048, metavar="TOKENS")
    add("--output-len", type=_positive, default=32, metavar="TOKENS")
    add("--repeats", type=_positive, default=1, help="single requests of each length, in a turn")
    add("--json", type=Path, metavar="FILE", help="write all rounds")
    add("--plot", type=Path, metavar="FILE", help="draw a .png, or one page of .html")
    yours = made.add_argument_group("servers that you run; nothing is started")
    yours.add_argument("--url", action="append", default=[], metavar="NAME=URL", help="first: the "
                       "reference; send requests there")  # fmt: skip
    yours.add_argument("--legs", action="append", default=[], metavar="NAME=P,D[,BOOTSTRAP]",
                       help="URLs of its prefill and decode server, for the handover; with the "
                       "bootstrap server's both legs are sent at once")  # fmt: skip
    yours.add_argument("--served-model", default="tiny", metavar="MODEL")
    yours.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="its tokenizer")
    add("--list", action="store_true", help="print the set-ups and end")
    add("--model", type=Path, required=True, help=argparse.SUPPRESS)
    add("--logs", type=Path, required=True, help=argparse.SUPPRESS)
    return made


def load_of(options: argparse.Namespace) -> Load:
    """What the framework's benchmark is told."""
    return Load(
        requests=6 if options.quick else options.requests,
        rate=options.rate,
        input_tokens=options.input_len,
        output_tokens=options.output_len,
        seed=0,
    )


def prompts_of(options: argparse.Namespace) -> tuple[int, ...]:
    """Lengths of the single requests."""
    return QUICK_PROMPTS if options.quick else PROMPTS


def wanted(options: argparse.Namespace) -> tuple[str, ...]:
    """Parts of names, empty for all."""
    if options.quick and not options.only:
        return QUICK_ONLY
    return tuple(part.strip() for part in options.only.split(",") if part.strip())


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number
