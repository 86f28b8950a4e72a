"""What a run leaves behind: rows of rounds, as they are written to the JSON file."""

from __future__ import annotations

import msgspec

from serving.overlap import Overlap
from serving.setup import Load, LoadFigures
from serving.sglang_pages import Pages


class Handed(msgspec.Struct, frozen=True, kw_only=True):
    """One request whose two legs the client sent.

    Attributes:
        tokens: Of its prompt.
        handover_ms: Decode's first token minus prefill's response, minus the aggregated server's
            decode step (`step_ms`) where decode makes one before its first token.
        prefill_ms: The request's start to prefill's response.
        step_ms: Mean time between two tokens of the same prompt on the aggregated server.
        equal: Decode's tokens are the aggregated server's.
        at_once: Both legs were sent at once, so decode's own preparation lies behind the prefill:
            only handovers of one style are compared.
    """

    tokens: int
    handover_ms: float
    prefill_ms: float
    step_ms: float
    equal: bool
    at_once: bool = False


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """One set-up's turn.

    Attributes:
        number: From 1; the set-ups take their turns within it.
        handed: Single requests, one after the other.
        load: What the framework's benchmark said.
        error: Why the turn is not whole; then it is in no median.
        other_load: Cores that were busy with anything but this run.
        timers: What the connector counted during this turn.
    """

    number: int
    handed: tuple[Handed, ...] = ()
    load: LoadFigures | None = None
    error: str = ""
    other_load: float = 0.0
    timers: dict[str, float] = {}


class Row(msgspec.Struct, kw_only=True):
    """One set-up. `error`: it could not be opened; what was tried, and what it printed.

    `group`: set-ups of one group were up at the same time, and took their turns together.
    `idle_cores`: what its servers took while nobody asked them for anything.
    """

    name: str
    framework: str
    route: str
    kind: str
    pairs: int
    needed: str = ""
    group: int = 0
    idle_cores: float = 0.0
    facts: dict[str, str] = {}
    rounds: list[Round] = []
    error: str = ""


class Result(msgspec.Struct, kw_only=True):
    """A whole run."""

    machine: dict[str, str]
    versions: dict[str, str]
    load: Load
    prompts: tuple[int, ...]
    rows: list[Row] = []
    overlap: list[Overlap] = []
    pages: list[Pages] = []
