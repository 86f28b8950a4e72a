"""What a benchmark run knows of servers: a set-up that can be opened, and what it then is.

Nothing here tells one framework from the other. A framework's module makes `Setup`s; whoever
measures opens one, and sends requests by the functions of the `Running` it gets.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

    from harness.completions import Reply
    from rich.console import Console

PAGE_SIZE = 64
PROMPTS = (512, 2048, 4096)  # tokens; the handover is measured at each
MAX_TOKENS = 4096 + 1024  # the longest prompt and what is generated behind it
# Our nodes tell their counts every second, and a server's processes theirs to its HTTP server.
SETTLED_S = 1.2
SETTLE_WITHIN_S = 10.0


class SetupFailed(Exception):
    """A set-up cannot be started here: what was tried, and what it printed.

    The run goes on without it, and the text stands in the result.
    """


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """One run of a framework's own benchmark.

    Attributes:
        requests: How many.
        rate: Requests a second, Poisson.
        input_tokens: Of each prompt.
        output_tokens: Of each answer.
        seed: Other prompts for another seed, so that no prefix cache helps.
    """

    requests: int
    rate: float
    input_tokens: int
    output_tokens: int
    seed: int


class Spread(msgspec.Struct, frozen=True):
    """Of one kind of latency, milliseconds."""

    mean: float
    p50: float
    p99: float


class LoadFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What the framework's own benchmark said. `output_tokens_s`: throughput of all requests."""

    output_tokens_s: float
    ttft: Spread
    tpot: Spread
    itl: Spread


class Exchange(msgspec.Struct, frozen=True, kw_only=True):
    """One request whose two legs the client sent itself; times are monotonic seconds.

    Attributes:
        sent: Before the first byte of the first leg.
        prefill_answered: Prefill's response was there, whole; where it answers only when its pages
            have been taken away, the moment it names as the end of its computation.
        first_token: Decode's first token was there.
        tokens: Decode's.
        steps: Decode steps in the gap: 0 where decode passes on the token that prefill generated.
    """

    sent: float
    prefill_answered: float
    first_token: float
    tokens: tuple[int, ...]
    steps: int = 1

    @property
    def gap_s(self) -> float:
        """What the handover is made of: less `steps` decode steps it is the handover."""
        return self.first_token - self.prefill_answered

    def handover_s(self, step_s: float) -> float:
        """Ditto; `step_s` is the aggregated server's time between two tokens."""
        return self.gap_s - self.steps * step_s


#: Stream one greedy request through `Running.url`, as a user would: prompt, tokens to generate.
Ask = Callable[[list[int], int], "Reply"]
#: Send both legs of one greedy request to the prefill and the decode server, in the set-up's own
#: dialect and in the order that it wants: prefill first, or both at once.
Hand = Callable[[list[int], int], Exchange]
#: Run the framework's own benchmark against `Running.url`; its files go beside the given one.
#: Raises `harness.process.ServerFailed`.
RunLoad = Callable[[Load, "Path"], LoadFigures]
#: The connector's own counts since start, name -> total: "seconds", "bytes", "batches". The
#: difference of two looks is what is shown.
Timers = Callable[[], dict[str, float]]
#: Stop all processes of a set-up between its turns (SIGSTOP), or let them go on.
Switch = Callable[[], None]


def no_timers() -> dict[str, float]:
    """Of a set-up that moves nothing, or that does not say."""
    return {}


def settled(
    look: Callable[[], dict[str, float]],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, float]:
    """What two looks a while apart agree on, or the last one after ten seconds."""
    deadline = clock() + SETTLE_WITHIN_S
    last = look()
    while clock() < deadline:
        sleep(SETTLED_S)
        now = look()
        if now == last:
            break
        last = now
    return last


def stay_up() -> None:
    """Of a set-up that costs nothing while idle, or that must not be stopped."""


@dataclass(frozen=True, kw_only=True)
class Running:
    """Servers that are up, warm, and idle.

    Attributes:
        url: Where requests go.
        prefill: URLs of the prefill servers; empty for a set-up that hands nothing over.
        decode: URLs of the decode servers.
        metrics: URLs with a `/metrics`, where there are any.
        ask: One request through `url`.
        hand: One request, both legs by the client, in the framework's usual order; None where
            there is none.
        hand_at_once: Ditto, both legs at once, where the usual order is prefill first.
        load: The framework's own benchmark.
        timers: The connector's own counts.
        pause: Called after each turn.
        resume: Called before each turn; returns when requests can be sent.
        facts: For the result: commands, versions.
    """

    url: str
    prefill: tuple[str, ...] = ()
    decode: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    ask: Ask
    hand: Hand | None = None
    hand_at_once: Hand | None = None
    load: RunLoad
    timers: Timers = no_timers
    pause: Switch = stay_up
    resume: Switch = stay_up
    facts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """Where a set-up is opened: folders of the model and for its own logs, and where it reports."""

    model: Path
    logs: Path
    console: Console


#: Start everything, wait, send the first slow request; leaving the context ends it all. Entering
#: raises `SetupFailed` when a package is missing or a server does not start.
Open = Callable[[Place], "AbstractContextManager[Running]"]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One row of the table.

    Attributes:
        name: Unique, as shown: "ours 1P1D, tcp".
        framework: "vllm", "sglang", or "url" for servers that the user runs.
        route: "tcp" or "same host": only set-ups of one route are compared; "" moves nothing.
        kind: "aggregated" (the reference of tokens and decode step), "regular", "ours", "peer".
        servers: How many servers it starts, so that as many set-ups are up as memory allows.
        pairs: Prefill servers; only set-ups with as many are compared.
        needed: What it took to start on a CPU, in words, "" when nothing; listed with the result.
        open: Starts it.
    """

    name: str
    framework: str
    route: str
    kind: str
    servers: int
    pairs: int = 1
    needed: str = ""
    open: Open
