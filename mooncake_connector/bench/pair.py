"""The two sides of one variant, as the driver holds them."""

from __future__ import annotations

import contextlib
import mmap
from typing import TYPE_CHECKING, NamedTuple, Self

import msgspec
import numpy as np

from mooncake_connector.bench import messages
from mooncake_connector.bench.base import BackendFailed
from mooncake_connector.bench.busy import busy_loops
from mooncake_connector.bench.handle import LIMIT_S, ChildSide, file_name
from mooncake_connector.bench.remote import reach

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from mooncake_connector.bench.base import Transfer, Variant
    from mooncake_connector.bench.conditions import Condition, Workload
    from mooncake_connector.bench.handle import Handle

LOOPBACK = "127.0.0.1"
TARGET_SEED, INITIATOR_SEED = 1, 2
#: A run may take this many times as long as all that was asked for, on a busy machine.
PATIENCE = 10.0


class Reading(NamedTuple):
    """What one measurement gave."""

    samples: NDArray[np.float64]  # seconds of each run, all threads
    in_place: NDArray[np.float64]  # ditto, by the engine's own clock; empty where it has none
    wall_s: float
    nbytes: int  # moved in that time
    initiator_cpu_s: float
    target_cpu_s: float


class Pair:
    """Two processes that run one variant; a context manager."""

    def __init__(self, variant: Variant, nbytes: int, logs: Path, target: str = "") -> None:
        """Start both sides, at the same time, and have them allocate and register.

        Args:
            variant: What to run.
            nbytes: Of each side's buffer; rounded up to whole pages.
            logs: Folder for the sides' output.
            target: host:port of a target server elsewhere (`remote.py`); empty: both sides are
                children of this process.

        Raises:
            BackendFailed: A side does not start, or the target server cannot be reached.
        """
        self.variant = variant
        self._work: tuple[tuple[Transfer, ...], ...] = ()
        self._connected = False
        stem = file_name(variant.name)
        nbytes = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        with contextlib.ExitStack() as opening:
            host = LOOPBACK
            self.target: Handle
            if target:
                self.target = remote = reach(target, f"{variant.name}, target at {target}")
                host = remote.own_host
            else:
                log = logs / f"{stem}-target.log"
                self.target = ChildSide(f"{variant.name}, target", variant.environment, log)
            opening.callback(self.target.close)
            log = logs / f"{stem}-initiator.log"
            self.initiator = ChildSide(f"{variant.name}, initiator", variant.environment, log)
            opening.callback(self.initiator.close)
            for side, role in ((self.target, "target"), (self.initiator, "initiator")):
                side.post(_opening(variant, role, nbytes, host))
            self.address = self.target.answer(messages.Opened).address
            self.initiator.answer(messages.Opened)
            self._opened = opening.pop_all()

    def connect(self) -> None:
        """Reach the target, unless that was done; everything below does it."""
        if not self._connected:
            self.initiator.ask(messages.Connect(address=self.address), messages.Done)
            self._connected = True

    def first_contact(self, transfer: Transfer) -> float:
        """Seconds of connect, prepare and one run, in a pair that did none of them before."""
        assert not self._connected, "a first contact needs a fresh pair"
        self._connected = True
        command = messages.Contact(address=self.address, transfer=messages.pack(transfer))
        return self.initiator.ask(command, messages.Seconds).value

    def check(self, workload: Workload) -> None:
        """Move each transfer once between buffers of known bytes; compare every byte.

        Raises:
            BackendFailed: With the first descriptor or byte that is wrong.
        """
        self.connect()
        nbytes = workload.buffer_bytes + mmap.PAGESIZE  # what lies behind is not to change either
        for op in sorted({t.op for transfers in workload.work for t in transfers}):
            work = [[t for t in transfers if t.op == op] for transfers in workload.work]
            self._check([transfers for transfers in work if transfers], op, nbytes)
        self._work = ()

    def _check(self, work: Sequence[Sequence[Transfer]], op: str, nbytes: int) -> None:
        self.target.post(messages.Fill(seed=TARGET_SEED, nbytes=nbytes))
        self.initiator.ask(messages.Fill(seed=INITIATOR_SEED, nbytes=nbytes), messages.Done)
        self.target.answer(messages.Done)
        prepare = messages.Prepare(work=messages.pack_work(work), warm_up_s=0.0)
        self.initiator.ask(prepare, messages.Done)
        turns = max(len(transfers) for transfers in work)
        self.initiator.ask(messages.Measure(seconds=0.0, runs=turns), messages.Measured)
        moved = [transfer for transfers in work for transfer in transfers]
        receiver: Handle
        if op == "read":
            receiver, seeds = self.initiator, (INITIATOR_SEED, TARGET_SEED)
        else:
            receiver, seeds = self.target, (TARGET_SEED, INITIATOR_SEED)
            moved = [msgspec.structs.replace(t, local=t.remote, remote=t.local) for t in moved]
        command = messages.Verify(
            moved=tuple(messages.pack(transfer) for transfer in moved),
            own_seed=seeds[0],
            other_seed=seeds[1],
            nbytes=nbytes,
        )
        receiver.ask(command, messages.Done)

    def prepare(self, workload: Workload, warm_up_s: float) -> None:
        """Have each thread prepare its transfers, and run them for `warm_up_s`."""
        self.connect()
        warm = messages.Prepare(work=messages.pack_work(workload.work), warm_up_s=warm_up_s)
        self.initiator.ask(warm, messages.Done, LIMIT_S + PATIENCE * warm_up_s)
        self._work = workload.work

    def measure(self, seconds: float, runs: int = 0) -> Reading:
        """Run what was prepared last: for so long, or so many times on each thread."""
        assert self._work, "prepare comes first"
        before = self.target.ask(messages.Clock(), messages.Seconds).value
        measured = self.initiator.ask(
            messages.Measure(seconds=seconds, runs=runs),
            messages.Measured,
            LIMIT_S + PATIENCE * seconds,
        )
        after = self.target.ask(messages.Clock(), messages.Seconds).value
        return Reading(
            np.frombuffer(measured.samples),
            np.frombuffer(measured.in_place) if measured.in_place else np.empty(0),
            measured.wall_s,
            measured.nbytes,
            measured.cpu_s,
            after - before,
        )

    @contextlib.contextmanager
    def beside(self, condition: Condition) -> Iterator[None]:
        """The load that a condition asks for, while inside."""
        sides = (self.target, self.initiator) if condition.busy_python else ()
        with busy_loops(condition.busy_loops):
            try:
                for side in sides:
                    side.ask(messages.Busy(on=True), messages.Done)
                yield
            finally:
                for side in sides:
                    side.resume()  # a failure may have come while it was stopped
                    # One that is lost has said so to whoever asked it last.
                    with contextlib.suppress(BackendFailed):
                        side.ask(messages.Busy(on=False), messages.Done)

    def suspend(self) -> None:
        """Stop both processes: an engine that spins takes no CPU from the others' turns.

        A target elsewhere goes on.
        """
        for side in (self.initiator, self.target):
            side.suspend()

    def resume(self) -> None:
        """Let them run again."""
        for side in (self.target, self.initiator):
            side.resume()

    def close(self) -> None:
        """End both processes; idempotent."""
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _opening(variant: Variant, role: str, nbytes: int, host: str) -> messages.Open:
    return messages.Open(
        role=role,
        backend=variant.backend,
        options={"host": host, **variant.options},
        environment=variant.environment,
        nbytes=nbytes,
    )
