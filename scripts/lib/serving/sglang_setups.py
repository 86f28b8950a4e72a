"""SGLang's rows of the table."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import serving.urls
from serving.setup import Setup
from serving.sglang_servers import STOCK, Plan, attached, pair, regular

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from serving.setup import Place, Running

FRAMEWORK = "sglang"
#: What any pair of SGLang's servers needs without a GPU; `harness/sglang.py` says why.
PAIR_NEEDS = (
    "SGLANG_USE_CPU_ENGINE=1, SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX=0, "
    "--disaggregation-decode-retraction-backup cpu_tensor"
)
STOCK_NEEDS = (
    f"{PAIR_NEEDS}; mooncake-transfer-engine-non-cuda; "
    "sglang_on_cpu.py: Mooncake's sender takes no page numbers in pinned memory"
)

#: What made Mooncake's TCP fastest in `bench transfer`; its default opens a connection a transfer.
TUNED = (
    ("MC_TCP_ENABLE_CONNECTION_POOL", "1"),
    ("MC_SLICE_SIZE", str(1 << 20)),
    ("MC_TCP_SLICE_SIZE", str(1 << 20)),
)


def setups() -> tuple[Setup, ...]:
    """All of them, the aggregated server first."""
    return (
        Setup(
            name="aggregated",
            framework=FRAMEWORK,
            route="",
            kind="aggregated",
            servers=1,
            open=functools.partial(regular, count=1),
        ),
        Setup(
            name="2 regular, round robin",
            framework=FRAMEWORK,
            route="",
            kind="regular",
            servers=2,
            open=functools.partial(regular, count=2),
        ),
        one_pair("ours 1P1D, tcp", Plan(protocol="tcp")),
        one_pair("ours 1P1D, shm", Plan(protocol="shm")),
        one_pair(f"{STOCK} 1P1D", Plan(backend=STOCK)),
        one_pair(f"{STOCK} 1P1D, tuned", Plan(backend=STOCK, environment=TUNED)),
    )


def one_pair(name: str, plan: Plan) -> Setup:
    """A prefill and a decode server of ours or of a peer's."""
    stock = plan.backend == STOCK
    return Setup(
        name=name,
        framework=FRAMEWORK,
        route="same host" if plan.protocol == "shm" else "tcp",
        kind="peer" if stock else "ours",
        servers=2,
        needed=STOCK_NEEDS if stock else PAIR_NEEDS,
        open=functools.partial(pair, plan=plan),
    )


def user_run(urls: Sequence[str], both_legs: Sequence[str]) -> tuple[Setup, ...]:
    """One for each `--url`, spoken to in SGLang's API; raises as `serving.urls.user_run`."""
    return serving.urls.user_run(
        urls, both_legs, lambda url, pair: functools.partial(_attached, urls=(url, *pair))
    )


def _attached(place: Place, urls: Sequence[str]) -> AbstractContextManager[Running]:
    return attached(place, *urls)
