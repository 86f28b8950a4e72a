"""SGLang's rows of the table."""

from __future__ import annotations

import functools

from serving.setup import Setup
from serving.sglang_servers import STOCK, Plan, attached, pair, regular

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


def user_runs(name: str, url: str, prefill: str = "", decode: str = "") -> Setup:
    """Servers that are up already, behind `url`; `prefill` and `decode` where it is a pair."""
    return Setup(
        name=name,
        framework="url",
        route="",
        kind="peer",
        servers=0,
        open=functools.partial(attached, url=url, prefill=prefill, decode=decode),
    )
