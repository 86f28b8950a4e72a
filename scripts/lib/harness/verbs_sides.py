"""Two ends of a queue pair by a verbs binding, over real devices: for tests and benchmarks."""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import time
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np
from mooncake_engine.transport.rdma.verbs import load
from mooncake_engine.transport.rdma.verbs.base import (
    COMPLETION,
    Access,
    GidEntry,
    Opcode,
    QueueCaps,
    RemoteQueue,
    SendLimits,
    Verbs,
    Work,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

REMOTE = Access.LOCAL_WRITE | Access.REMOTE_WRITE | Access.REMOTE_READ
CAPS = QueueCaps(max_send_wr=64, max_recv_wr=16, max_send_sge=4, max_recv_sge=1, max_inline=64)
#: 2**12 * 4.096 us = 17 ms, six times: a lost answer is asked for again long before a test ends.
LIMITS = SendLimits(sq_psn=0, timeout=12, retry_count=6, rnr_retry=7, max_rd_atomic=16)
WAIT_S = 60.0  # emulated guests are slow

#: (remote offset, [(local offset, length), ...])
Row = tuple[int, list[tuple[int, int]]]


def binding() -> Verbs:
    """The binding under test: MC_VERBS_BINDING, or the default one."""
    chosen = os.environ.get("MC_VERBS_BINDING", "native")
    assert chosen in {"native", "pyverbs"}
    return load(chosen)  # type: ignore[arg-type]  # checked above


def chosen_gid(gids: Sequence[GidEntry]) -> GidEntry:
    """RoCE v2 over IPv4, else the first."""
    ipv4 = [row for row in gids if row.kind == "roce_v2" and row.raw[10:12] == b"\xff\xff"]
    return (ipv4 or list(gids))[0]


class Remote(NamedTuple):
    """Memory of a peer that is not a `Side`."""

    address: int
    rkey: int


class Side:
    """A device, 1 MiB of registered memory, a channel, a completion queue and a queue pair."""

    def __init__(
        self, verbs: Verbs, name: str, *, caps: QueueCaps = CAPS, depth: int = 256, psn: int = 7
    ) -> None:
        with contextlib.ExitStack() as stack:
            self.memory = mmap.mmap(-1, 1 << 20)
            self.data: NDArray[np.uint8] = np.frombuffer(self.memory, np.uint8)
            self.address = int(self.data.ctypes.data)
            self.psn = psn
            self.device = verbs.open(name)
            stack.callback(self.device.close)
            self.region = self.device.register(self.address, len(self.memory), REMOTE)
            stack.callback(self.region.close)
            self.channel = self.device.channel()
            stack.callback(self.channel.close)
            self.queue = self.device.completion_queue(depth, self.channel)
            stack.callback(self.queue.close)
            self.pair = self.device.queue_pair(self.queue, self.queue, caps)
            stack.callback(self.pair.close)
            self.gid = chosen_gid(self.device.gids(1))
            self._stack = stack.pop_all()

    def connect(self, peer: Side, *, limits: SendLimits = LIMITS, **changes: int) -> None:
        """This end only: to INIT, RTR, RTS."""
        self.reach(peer.pair.number, peer.gid.raw, peer.psn, limits=limits, **changes)

    def reach(
        self, number: int, gid: bytes, psn: int, *, limits: SendLimits = LIMITS, **changes: int
    ) -> None:
        """The same with a peer that is not ours. `changes`: fields of `RemoteQueue`."""
        remote = RemoteQueue(
            number=number,
            rq_psn=psn,
            lid=self.device.port(1).lid,
            gid=gid,
            sgid_index=self.gid.gid_index,
            port=1,
            mtu=1024,
            max_dest_rd_atomic=16,
            min_rnr_timer=12,
            traffic_class=0,
            service_level=0,
            hop_limit=64,
            flow_label=0,
            src_path_bits=0,
            static_rate=0,
            is_global=True,
        )
        self.pair.to_init(1, 0, REMOTE)
        self.pair.to_rtr(RemoteQueue(**{**remote._asdict(), **changes}))
        self.pair.to_rts(limits._replace(sq_psn=self.psn))

    @property
    def rkey(self) -> int:
        """What a peer needs to reach our memory."""
        return self.region.rkey

    def work(self, peer: Side | Remote, rows: Sequence[Row]) -> Work:
        """Offsets in both memories as a `Work`."""
        counts = np.array([len(entries) for _, entries in rows], np.int64)
        local = np.array([entry for _, entries in rows for entry in entries], np.uint64)
        return Work(
            remote=np.array([offset for offset, _ in rows], np.uint64) + np.uint64(peer.address),
            sge_first=np.cumsum(counts) - counts,
            sge_count=counts,
            local=local[:, 0] + np.uint64(self.address),
            local_length=local[:, 1].astype(np.uint32),
        )

    def post(
        self,
        opcode: Opcode,
        peer: Side | Remote,
        rows: Sequence[Row],
        *,
        part: slice | None = None,
        rkey: int | None = None,
        lkey: int | None = None,
        wr_id: int = 0,
        signal_every: int = 1 << 20,
        inline: int = 0,
    ) -> int:
        """Post; `part`: of the rows. Returns how many were accepted."""
        work = self.work(peer, rows)
        lkeys = np.full(work.local.size, self.region.lkey if lkey is None else lkey, np.uint32)
        rkeys = np.full(work.remote.size, peer.rkey if rkey is None else rkey, np.uint32)
        return self.pair.post(
            opcode,
            work,
            part or slice(0, len(rows)),
            lkeys,
            rkeys,
            wr_id=wr_id,
            signal_every=signal_every,
            inline=inline,
        )

    def completions(self, count: int, timeout_s: float = WAIT_S) -> NDArray[np.void]:
        """Wait for exactly so many, as the contract says to: arm, poll, sleep on the channel."""
        found, have = np.zeros(max(count, 1), COMPLETION), 0
        end = time.monotonic() + timeout_s
        while have < count:
            have += self.queue.poll(found[have:])
            if have == count:
                break
            self.queue.arm()
            have += self.queue.poll(found[have:])
            if have < count:
                left = end - time.monotonic()
                assert left > 0, f"{have} of {count} completions: {found[:have]}"
                select.select([self.channel], [], [], left)
                self.channel.drain()
        return found[:count]

    def close(self) -> None:
        """All of it, children first; idempotent."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
