"""What posting work requests costs with each verbs binding: ns a request, by batch.

    bench_posting.py [--binding native|pyverbs] [--device NAME] [--entries N] [--json FILE]

Without a device: filling the chain, and for `native` posting it to a stub, a post_send in C that
walks the chain and writes 64 bytes a request, as a NIC's does. With one: posting over it to a
queue pair of the same device, whose kernel's work is then in the figure with Soft-RoCE.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import shutil
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from harness.verbs_sides import CAPS, Row, Side
from mooncake_engine.transport.rdma.verbs import abi, load
from mooncake_engine.transport.rdma.verbs.base import Opcode, QueueCaps, Work
from mooncake_engine.transport.rdma.verbs.chain import Chain
from mooncake_engine.transport.rdma.verbs.native_queues import NativeQueuePair

if TYPE_CHECKING:
    from collections.abc import Callable

    from mooncake_engine.transport.rdma.verbs import pyverbs_chain

BATCHES = (1, 16, 64, 256, 1024)
BYTES = 256  # an entry, with a device
SECONDS = 0.5  # for each figure, and at least three times

STUB = """
#include <infiniband/verbs.h>
#include <string.h>
static char ring[65536 * 64];
static unsigned head;
int stub(struct ibv_qp *qp, struct ibv_send_wr *wr, struct ibv_send_wr **bad) {
    for (; wr; wr = wr->next) {
        char *slot = ring + (head++ & 65535) * 64;
        memcpy(slot, &wr->wr.rdma, 16);
        memcpy(slot + 16, wr->sg_list, 16);
        memcpy(slot + 32, &wr->wr_id, 8);
        slot[40] = wr->opcode;
        slot[41] = wr->send_flags;
    }
    return 0;
}
"""


def main() -> None:
    """Measure and print a table."""
    options = arguments()
    if options.device:
        rows = {f"{options.binding} over {options.device}": over_device(options)}
    else:
        rows = {f"{options.binding}, filling the chain": filling(options)}
        if options.binding == "native":
            rows["native, filling and posting to a stub"] = to_stub(options.entries)
    print(f"{'ns a work request, by batch':40}" + "".join(f"{batch:>10}" for batch in BATCHES))
    for name, figures in rows.items():
        print(f"{name:40}" + "".join(f"{figures[batch]:10.0f}" for batch in BATCHES))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


def arguments() -> argparse.Namespace:
    """The command line's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--binding", choices=["native", "pyverbs"], default="native")
    parser.add_argument("--device", default="")
    parser.add_argument("--entries", type=int, default=1, help="scatter/gather entries a request")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def cheapest(action: Callable[[], object], after: Callable[[], object] = lambda: None) -> int:
    """Ns of the cheapest of many calls: the machine's other load only ever adds."""
    best, rounds, end = 1 << 62, 0, time.monotonic() + SECONDS
    while rounds < 3 or time.monotonic() < end:
        begin = time.perf_counter_ns()
        action()
        best = min(best, time.perf_counter_ns() - begin)
        after()
        rounds += 1
    return best


def work_of(requests: int, entries: int) -> Work:
    """So many requests, which nobody will carry out."""
    count = requests * entries
    return Work(
        remote=np.arange(requests, dtype=np.uint64) * np.uint64(65536),
        sge_first=np.arange(requests, dtype=np.int64) * entries,
        sge_count=np.full(requests, entries, np.int64),
        local=np.arange(count, dtype=np.uint64) * np.uint64(65536),
        local_length=np.full(count, 65536, np.uint32),
    )


def filling(options: argparse.Namespace) -> dict[int, float]:
    """Writing the chain alone."""
    entries: int = options.entries
    if options.binding == "native":
        chain = Chain(max(BATCHES), entries)
        return {batch: fill(chain, batch, entries) for batch in BATCHES}
    load("pyverbs")  # says what to install
    from mooncake_engine.transport.rdma.verbs import pyverbs_chain

    with contextlib.closing(pyverbs_chain.Chain(max(BATCHES))) as other:
        return {batch: fill(other, batch, entries) for batch in BATCHES}


def fill(chain: Chain | pyverbs_chain.Chain, batch: int, entries: int) -> float:
    """Ns a request of one batch; frees what was made for it, and joins what was cut."""
    work = work_of(batch, entries)
    lkeys, rkeys = np.full(batch * entries, 7, np.uint32), np.full(batch, 8, np.uint32)
    what = (Opcode.READ, work, slice(0, batch), lkeys, rkeys)

    def once() -> None:
        chain.fill(*what, wr_id=1, signal_every=batch, inline=0)
        if isinstance(chain, Chain):
            chain.rejoin(batch)
        else:
            chain.release()

    return cheapest(once) / batch


def to_stub(entries: int) -> dict[int, float]:
    """`post` of the native queue pair, with a C function in the place of a NIC's."""
    if not shutil.which("cc"):
        raise SystemExit("the stub is compiled; install a C compiler: apt-get install gcc")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "stub.c"), Path(folder, "stub.so")
        source.write_text(STUB)
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
        stub = ctypes.CDLL(str(library)).stub

    def functions(_offset: int, *signature: object) -> Callable[..., int]:
        address = ctypes.cast(stub, ctypes.c_void_p).value
        return ctypes.PYFUNCTYPE(*signature)(address)  # type: ignore[arg-type]  # ctypes types

    memory = ctypes.create_string_buffer(abi.QP_NUM + 4)
    caps = QueueCaps(max(BATCHES), 1, entries, 1, 0)
    pair = NativeQueuePair(ctypes.CDLL(None), functions, ctypes.addressof(memory), caps)
    figures = {}
    for batch in BATCHES:
        work = work_of(batch, entries)
        lkeys, rkeys = np.full(batch * entries, 7, np.uint32), np.full(batch, 8, np.uint32)
        post = partial(pair.post, Opcode.READ, work, slice(0, batch), lkeys, rkeys)
        figures[batch] = cheapest(partial(post, wr_id=1, signal_every=batch, inline=0)) / batch
    return figures


def over_device(options: argparse.Namespace) -> dict[int, float]:
    """`post` over a device, the queue empty each time."""
    verbs = load(options.binding)
    caps = CAPS._replace(max_send_wr=max(BATCHES), max_send_sge=max(1, options.entries))
    with Side(verbs, options.device, caps=caps) as ours, Side(verbs, options.device) as theirs:
        ours.connect(theirs)
        theirs.connect(ours)
        figures = {}
        for batch in BATCHES:
            entries = [(BYTES * entry, BYTES) for entry in range(options.entries)]
            rows: list[Row] = [(0, entries)] * batch
            work = ours.work(theirs, rows)
            lkeys = np.full(work.local.size, ours.region.lkey, np.uint32)
            rkeys = np.full(batch, theirs.rkey, np.uint32)
            post = partial(ours.pair.post, Opcode.WRITE, work, slice(0, batch), lkeys, rkeys)
            post = partial(post, wr_id=1, signal_every=batch, inline=0)
            figures[batch] = cheapest(post, lambda: ours.completions(1)) / batch
        return figures


if __name__ == "__main__":
    main()
