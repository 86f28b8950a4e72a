"""`scripts/bench rdma`: our READ and WRITE beside ib_read_bw and ib_write_bw, in turns.

Both have the same pair of devices, queue pairs, depth, READs under way and MTU, and move about the
same bytes. In turns, because on a shared machine the load between two runs differs by more than
what is measured; the ratio is the median of the rounds' own ratios. Our bytes are compared.
"""

from __future__ import annotations

import argparse
import collections
import json
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from mooncake_engine import (
    EngineConfig,
    MetadataConfig,
    Op,
    RdmaConfig,
    Status,
    TcpConfig,
    TransferEngine,
)
from mooncake_engine.testing.target import ChildTarget, digest, pattern
from rich.console import Console
from rich.table import Table

from mooncake_connector.bench import perftest

if TYPE_CHECKING:
    from mooncake_engine import Batch, Segment
    from mooncake_engine.testing.target import Target
    from numpy.typing import NDArray

    Uint64s = NDArray[np.uint64]

MIB = 1 << 20
REGION = 16 * MIB  # one batch moves it once, each request to its own place
UNDER_WAY = 2  # batches; the next one is there when one ends
FIRST_PORT = 18515  # perftest's own default; each run takes the next


class Case(NamedTuple):
    """What is compared."""

    op: str
    nbytes: int


class Round(NamedTuple):
    """MiB/s of one turn each."""

    perftest: float
    ours: float

    @property
    def ratio(self) -> float:
        """Ours by theirs."""
        return self.ours / self.perftest


class Ours:
    """An engine here, and one in a child process, each with one device."""

    def __init__(self, link: perftest.Link, slice_bytes: int) -> None:
        self.target: Target = ChildTarget(settings(link, link.theirs, slice_bytes), REGION)
        try:
            self.engine = TransferEngine(settings(link, link.ours, slice_bytes))
        except BaseException:
            self.target.close()
            raise
        self.memory: NDArray[np.uint8] = self.engine.allocate(REGION)
        self.segment: Segment = self.engine.open_segment(self.target.record)

    def mib_per_s(self, case: Case, nbytes: int) -> float:
        """Move at least `nbytes`, in whole batches; check them; the rate."""
        self.target.fill(1)
        self.memory[:] = pattern(2, REGION)
        wanted = pattern(1 if case.op == "read" else 2, REGION)
        rows = self._rows(case)
        waiting: collections.deque[Batch] = collections.deque()
        begin = time.monotonic()
        for _ in range(-(-nbytes // REGION)):
            if len(waiting) == UNDER_WAY:
                self._end(waiting.popleft())
            waiting.append(self.engine.submit(Op(case.op), self.segment, *rows))
        while waiting:
            self._end(waiting.popleft())
        seconds = time.monotonic() - begin
        if not digest(wanted) == digest(self.memory) == self.target.digest():
            raise AssertionError(f"{case}: other bytes arrived than were sent")
        return -(-nbytes // REGION) * REGION / MIB / seconds

    def _rows(self, case: Case) -> tuple[Uint64s, Uint64s, Uint64s]:
        """Addresses here and there, lengths. In another order than they lie, so none are merged."""
        offsets = np.arange(0, REGION, case.nbytes, dtype=np.uint64)
        np.random.default_rng(3).shuffle(offsets)
        here = np.uint64(self.memory.__array_interface__["data"][0])
        lengths = np.full(offsets.size, case.nbytes, np.uint64)
        return offsets + here, offsets + np.uint64(self.target.address), lengths

    def _end(self, batch: Batch) -> None:
        end = batch.wait(120.0)
        if end.status is not Status.OK:
            raise AssertionError(f"our transfer ended {end}")

    def close(self) -> None:
        """Both engines."""
        self.engine.close()
        self.target.close()


def settings(link: perftest.Link, device: str, slice_bytes: int) -> EngineConfig:
    """The same as perftest is told."""
    return EngineConfig(
        protocol="rdma",
        strict_transport=True,
        host=link.address,
        transfer_timeout_s=120.0,
        tcp=TcpConfig(min_port=0, max_port=0),
        metadata=MetadataConfig(p2p_min_port=0, p2p_max_port=0),
        rdma=RdmaConfig(
            devices=(device,),
            min_port=0,
            max_port=0,
            gid_index=link.gid_index,
            num_qp=link.queue_pairs,
            max_wr=link.depth,
            max_rd_atomic=link.reads,
            max_dest_rd_atomic=link.reads,
            mtu=link.mtu,  # type: ignore[arg-type]  # one of argparse's choices, which are the same
            slice_bytes=slice_bytes,
            # perftest repeats for ever (7) after 67 ms; a busy emulated processor takes longer.
            send_timeout=18,
        ),
    )


def compare(options: argparse.Namespace, link: perftest.Link, console: Console) -> int:
    """All cases; prints the table, writes the JSON."""
    port = FIRST_PORT
    results: dict[Case, list[Round]] = {}
    for size in options.sizes:
        ours = Ours(link, options.slice_bytes or size)
        try:
            for case in (Case("read", size), Case("write", size)):
                results[case], port = rounds_of(case, ours, options, link, console, port)
        finally:
            ours.close()
    report(results, options, link, console)
    return 0


def rounds_of(
    case: Case,
    ours: Ours,
    options: argparse.Namespace,
    link: perftest.Link,
    console: Console,
    port: int,
) -> tuple[list[Round], int]:
    """All rounds of one case, and the next free port."""
    least = link.depth * link.queue_pairs * case.nbytes
    rate = perftest.mib_per_s(case.op, link, case.nbytes, link.depth, port)
    ours.mib_per_s(case, REGION)  # connects, and touches every page once
    nbytes = max(least, int(rate * MIB * options.seconds))
    iterations = nbytes // case.nbytes // link.queue_pairs
    rounds: list[Round] = []
    for number in range(options.rounds):
        port += 1
        theirs = perftest.mib_per_s(case.op, link, case.nbytes, iterations, port)
        rounds.append(Round(theirs, ours.mib_per_s(case, nbytes)))
        turn = f"{number + 1} of {options.rounds}: perftest {theirs:.1f} MiB/s"
        console.print(f"{case.op} {case.nbytes >> 10} KiB, {turn}, ours {rounds[-1].ours:.1f}")
    return rounds, port + 1


def report(
    results: dict[Case, list[Round]],
    options: argparse.Namespace,
    link: perftest.Link,
    console: Console,
) -> None:
    """The table, and all rounds as JSON."""
    table = Table(
        *("operation", "perftest, MiB/s", "ours, MiB/s", "ratio", "least to most"),
        title=f"{link.ours} to {link.theirs}: {link.queue_pairs} queue pairs, depth {link.depth}, "
        f"{link.reads} reads under way, MTU {link.mtu}",
        caption=f"medians of {options.rounds} alternating rounds; the ratio is the rounds' own",
    )
    for case, rounds in results.items():
        ratios = [each.ratio for each in rounds]
        table.add_row(
            f"{case.op.upper()} {case.nbytes >> 10} KiB",
            f"{statistics.median(each.perftest for each in rounds):.1f}",
            f"{statistics.median(each.ours for each in rounds):.1f}",
            f"{statistics.median(ratios):.2f}",
            f"{min(ratios):.2f} to {max(ratios):.2f}",
        )
    console.print(table)
    if options.json:
        written = [
            {
                "operation": case.op,
                "bytes": case.nbytes,
                "ratio": statistics.median(each.ratio for each in rounds),
                "rounds": [each._asdict() for each in rounds],
            }
            for case, rounds in results.items()
        ]
        options.json.write_text(json.dumps({"link": link._asdict(), "cases": written}, indent=2))


def main() -> int:
    """Parse the command line; the devices default to the guest's rail A."""
    parser = argparse.ArgumentParser(prog="scripts/bench rdma", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="about, of one program's turn")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64 << 10, MIB], metavar="BYTES")
    parser.add_argument(
        "--slice-bytes", type=int, default=0, help="our work request; 0: as large as perftest's"
    )
    parser.add_argument("--ours", default="rxe0", help="initiator's device")
    parser.add_argument("--theirs", default="rxe1", help="target's device, on this machine, too")
    parser.add_argument("--address", default="10.77.0.11", help="of the target's device")
    parser.add_argument("--gid-index", type=int, default=1)
    parser.add_argument("--queue-pairs", type=int, default=2)
    parser.add_argument("--depth", type=int, default=32, help="work requests of a queue pair")
    parser.add_argument("--reads", type=int, default=16, help="under way on a queue pair")
    parser.add_argument("--mtu", type=int, default=4096, choices=(256, 512, 1024, 2048, 4096))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rounds as JSON")
    options = parser.parse_args()
    link = perftest.Link(**{name: getattr(options, name) for name in perftest.Link._fields})
    console = Console(width=None if sys.stdout.isatty() else 110)
    try:
        return compare(options, link, console)
    except (perftest.PerftestFailed, AssertionError) as failed:
        console.print(str(failed), markup=False, highlight=False, soft_wrap=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
