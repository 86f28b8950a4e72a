"""The table of targets: what each row runs, and what it has to reach. Pure.

A *group* is what is measured in alternation; its *goals* are judged by the group's own turns. The
figures of `at_least` and `at_most` are the project's targets and are not for changing here.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

import msgspec

from mooncake_connector.bench.base import Route, Transfer
from mooncake_connector.bench.conditions import Condition, Workload, workload
from peers.blocks import KIB, MIB, apart, scattered

if TYPE_CHECKING:
    from collections.abc import Iterable

OURS = {Route.TCP: "ours tcp", Route.SAME_HOST: "ours shm"}
#: What stands beside peers whose lists are prepared once, too.
PREPARED = {route: f"{name}, prepared" for route, name in OURS.items()}
#: With `shm.share_registered`, which is ours to set as peers have their best settings.
SHARED = "ours shm, shared pages"
SOCKETS, MEMCPY, KERNEL = "C sockets", "memcpy in C", "process_vm in C"
CALLED = "Python calling C sockets"
NIXL, MOONCAKE = "NIXL", "Mooncake tcp"
#: Modules of what the machine can do, loops in C.
LIMITS = {Route.TCP: "sockets", Route.SAME_HOST: "memcpy"}
PEERS = ("mooncake", "nixl", "ucx", "zmq", "gloo")
BUSY, LOOPS = Condition(busy_python=True), Condition(busy_loops=2)


class Kind(enum.StrEnum):
    """What a goal compares. `than` of each is said in `verdicts.py`."""

    FASTER = "times as fast"
    IN_PLACE = "times as fast, to the last byte"
    CPU = "CPU s/GB"
    P50 = "p50 against quiet"
    P99 = "p99 against quiet p50"
    DROP = "drop against C's"


class Goal(msgspec.Struct, frozen=True, kw_only=True):
    """One target of one workload.

    Attributes:
        workload: Name of the workload that it judges.
        ours: Our variant.
        against: Who: how the names of the variants begin, of which the best counts. For DROP the
            same. For P50 and P99 whose figures are shown beside.
        without: Variants whose names have this in them are not meant.
        beside: Workload to compare with, for P50, P99 and DROP.
        bound: At least so much for FASTER, IN_PLACE and DROP, at most for the others.
    """

    workload: str
    ours: str
    kind: Kind = Kind.FASTER
    against: tuple[str, ...] = ()
    without: str = ""
    beside: str = ""
    bound: float


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """What is measured in alternation.

    Attributes:
        key: Its name on the command line.
        title: Its name in the table.
        route: Of all its variants.
        backends: Modules of `mooncake_connector.bench.backends`; all their variants take part.
        workloads: One after the other in each round.
        goals: What it has to reach.
        turn_s: How long one turn measures.
        most: Of a backend's variants, those whose names begin with one of these; empty: all.
        every_ours: Ours in all its settings, not as it comes only.
    """

    key: str
    title: str
    route: Route
    backends: tuple[str, ...]
    workloads: tuple[Workload, ...]
    goals: tuple[Goal, ...]
    turn_s: float = 0.4
    most: tuple[str, ...] = ()
    every_ours: bool = False

    @property
    def buffer_bytes(self) -> int:
        """What each side's buffer must hold."""
        return max(workload.buffer_bytes for workload in self.workloads)


def groups() -> tuple[Group, ...]:
    """All rows that are measured by turns, in the order of the table."""
    return (
        *_large(),
        *_small(),
        *_single(1),
        *_single(16),
        *(_busy_loops(route) for route in OURS),
        *(_busy_python(route) for route in OURS),
        _run_lengths(),
    )


def quick() -> Group:
    """One coarse comparison that takes a minute: is ours faster than Mooncake at its best?"""
    shape = (2048, 128 * KIB)
    moved = workload(name(*shape, "read"), scattered("read", *shape))
    goal = Goal(workload=moved.name, ours=OURS[Route.TCP], against=(MOONCAKE,), bound=1.0)
    return Group(
        key="quick",
        title="2048 x 128 KiB, tcp",
        route=Route.TCP,
        backends=("ours", "mooncake"),
        workloads=(moved,),
        goals=(goal,),
        turn_s=0.5,
        most=(OURS[Route.TCP], *_merged_mooncake()),
    )


def _both(count: int, size: int, condition: Condition | None = None) -> tuple[Workload, ...]:
    return tuple(
        workload(name(count, size, op, condition), scattered(op, count, size), condition=condition)
        for op in ("read", "write")
    )


def name(count: int, size: int, op: str, condition: Condition | None = None) -> str:
    """As the table has it: "2048 x 128 KiB read"."""
    unit = f"{size // MIB} MiB" if size % MIB == 0 else f"{size // KIB} KiB"
    load = ""
    if condition == BUSY:
        load = ", busy Python"
    elif condition == LOOPS:
        load = ", two busy loops"
    return f"{count} x {unit} {op}{load}"


def _ops(
    count: int,
    size: int,
    route: Route,
    bounds: tuple[float, float],
    *against: str,
    ours: str = "",
    without: str = "",
    kind: Kind = Kind.FASTER,
) -> list[Goal]:
    """A goal for reading and one for writing."""
    return [
        Goal(
            workload=name(count, size, op),
            ours=ours or PREPARED[route],
            kind=kind,
            against=against,
            without=without,
            bound=bound,
        )
        for op, bound in zip(("read", "write"), bounds, strict=True)
    ]


def _large() -> Iterable[Group]:
    shape, tcp, host = (2048, 128 * KIB), Route.TCP, Route.SAME_HOST
    yield Group(
        key="large-tcp",
        title="2048 x 128 KiB, tcp",
        route=tcp,
        backends=("ours", *PEERS, "sockets"),
        workloads=_both(*shape),
        goals=(
            *_ops(*shape, tcp, (0.95, 0.95), SOCKETS),
            *_ops(*shape, tcp, (1.5, 1.2), NIXL),
            *_ops(*shape, tcp, (2.2, 2.2), MOONCAKE),
            *_ops(*shape, tcp, (0.6, 0.6), kind=Kind.CPU),
        ),
        turn_s=0.6,
        every_ours=True,
    )
    yield Group(
        key="large-host",
        title="2048 x 128 KiB, same host",
        route=host,
        backends=("ours", *PEERS, "memcpy"),
        workloads=_both(*shape),
        goals=tuple(
            goal
            for ours in (SHARED, PREPARED[host])
            for goal in (
                *_ops(*shape, host, (0.9, 0.9), "memcpy in C, 2", ours=ours),
                *_ops(*shape, host, (1.8, 1.8), NIXL, ours=ours),
                *_ops(*shape, host, (0.3, 0.3), kind=Kind.CPU, ours=ours),
            )
        ),
        turn_s=0.5,
        every_ours=True,
    )


def _small() -> Iterable[Group]:
    shape, tcp, host = (2048, 4 * KIB), Route.TCP, Route.SAME_HOST
    yield Group(
        key="small-tcp",
        title="2048 x 4 KiB, tcp",
        route=tcp,
        backends=("ours", *PEERS, "sockets"),
        workloads=_both(*shape),
        goals=(
            *_ops(*shape, tcp, (1.7, 3.0), NIXL),
            *_ops(*shape, tcp, (12.0, 12.0), "Mooncake tcp, pool", without="runs merged"),
            *_ops(*shape, tcp, (4.0, 4.0), *_merged_mooncake()),
        ),
        every_ours=True,
    )
    yield Group(
        key="small-host",
        title="2048 x 4 KiB, same host",
        route=host,
        backends=("ours", *PEERS, "memcpy"),
        workloads=_both(*shape),
        goals=tuple(_ops(*shape, host, (2.5, 2.5), NIXL)),
        every_ours=True,
    )


def _merged_mooncake() -> Iterable[str]:
    for settings in ("", ", pool", ", pool, 1 MiB slices"):
        yield f"{MOONCAKE}{settings}, runs merged"


def _single(count: int) -> Iterable[Group]:
    """Few blocks: latency. "Faster" is a ratio above 1."""
    shape = (count, 4 * KIB)
    peers: tuple[str, ...] = (NIXL, MOONCAKE, "UCX", "ZeroMQ", "gloo")
    for route, limit in LIMITS.items():
        bound, against = 1.0, peers
        if count == 1 and route is Route.SAME_HOST:
            bound, against = 1 / 1.5, (NIXL,)
        words = "tcp" if route is Route.TCP else "host"
        yield Group(
            key=f"{'one' if count == 1 else 'sixteen'}-{words}",
            title=f"4 KiB x {count}, {route}",
            route=route,
            backends=("ours", *PEERS, limit),
            workloads=_both(*shape),
            goals=tuple(_ops(*shape, route, (bound, bound), *against)),
            turn_s=0.25,
            every_ours=True,
        )


def _busy_loops(route: Route) -> Group:
    shapes = ((16, 4 * KIB), (2048, 128 * KIB))
    quiet = [w for shape in shapes for w in _both(*shape)]
    busy = [w for shape in shapes for w in _both(*shape, LOOPS)]
    # A loop in C is preempted by the same scheduler.
    names = (SOCKETS,) if route is Route.TCP else (KERNEL,)
    goals = [
        Goal(
            workload=after.name,
            beside=before.name,
            ours=PREPARED[route],
            kind=kind,
            against=names,
            bound=bound,
        )
        for before, after in zip(quiet, busy, strict=True)
        for kind, bound in ((Kind.P50, 3.0), (Kind.P99, 20.0))
    ]
    return Group(
        key=f"busy-loops-{'tcp' if route is Route.TCP else 'host'}",
        title=f"two busy loops beside, {route}",
        route=route,
        backends=("ours", LIMITS[route]),
        workloads=(*quiet, *busy),
        goals=tuple(goals),
        turn_s=0.6,
        most=(PREPARED[route], *names),
        every_ours=True,
    )


def _busy_python(route: Route) -> Group:
    shapes = ((2048, 128 * KIB), (2048, 4 * KIB), (1, 4 * KIB))
    names = (SOCKETS, CALLED) if route is Route.TCP else (KERNEL,)
    busy = [w for shape in shapes for w in _both(*shape, BUSY)]
    # The C loop takes the time itself and so knows nothing of the interpreter lock; nor does the
    # moment at which our last byte is in place. The caller waits up to a switch interval longer.
    # Who returns to Python after each run leaves the cores to others for a while, and so does the
    # same loop when Python calls it: that one stands beside it.
    goals = [
        Goal(
            workload=each.name,
            ours=PREPARED[route],
            kind=Kind.IN_PLACE,
            against=(against,),
            bound=0.8,
        )
        for each in busy
        for against in names
    ]
    return Group(
        key=f"busy-python-{'tcp' if route is Route.TCP else 'host'}",
        title=f"a busy Python thread in each process, {route}",
        route=route,
        backends=("ours", LIMITS[route]),
        workloads=tuple(busy),
        goals=tuple(goals),
        most=(PREPARED[route], *names),
        every_ours=True,
    )


def _run_lengths() -> Group:
    """64 MiB in runs of each length; no two touch, so that each is what its name says."""
    sizes = [size * KIB for size in (1, 4, 16, 64, 256, 1024)]

    def one(size: int) -> Transfer:
        return apart("read", 64 * MIB // size, size)

    works = [workload(name(64 * MIB // size, size, "read"), one(size)) for size in sizes]
    goals = [
        Goal(workload=each.name, ours=PREPARED[Route.TCP], against=(SOCKETS,), bound=0.95)
        for each in works[:-1]  # 1 MiB is there for the drop's sake
    ]
    drop = Goal(
        workload=works[1].name,
        beside=works[-1].name,
        ours=PREPARED[Route.TCP],
        kind=Kind.DROP,
        against=(SOCKETS,),
        bound=0.9,
    )
    return Group(
        key="run-lengths",
        title="run lengths, tcp",
        route=Route.TCP,
        backends=("ours", "sockets"),
        workloads=tuple(works),
        goals=(*goals, drop),
        most=(OURS[Route.TCP], SOCKETS),
        every_ours=True,
    )
