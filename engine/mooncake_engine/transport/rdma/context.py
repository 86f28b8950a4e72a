"""One NIC, open: its protection domain, completion queues, threads and settings."""

from __future__ import annotations

import contextlib
import itertools
from typing import TYPE_CHECKING

from mooncake_engine.transport.rdma import gids
from mooncake_engine.transport.rdma.completions import Completions
from mooncake_engine.transport.rdma.records import DeviceRecord
from mooncake_engine.transport.rdma.verbs.base import (
    Access,
    QueueCaps,
    RemoteQueue,
    SendLimits,
    VerbsError,
)
from mooncake_engine.transport.rdma.workers import Workers

if TYPE_CHECKING:
    from collections.abc import Callable

    from mooncake_engine.config import RdmaConfig
    from mooncake_engine.transport.rdma.messages import QueueAddress
    from mooncake_engine.transport.rdma.verbs.base import QueuePair, Verbs

_ACCESS = Access.LOCAL_WRITE | Access.REMOTE_WRITE | Access.REMOTE_READ
#: A target's queue pair receives one message in its life: the probe.
_RECEIVES = 1


class Context:
    """Everything that queue pairs of one NIC share.

    Attributes:
        config: The settings.
        device: The open device.
        limits: What it can do.
        record: What peers are told of it.
        why_gid: Why this GID, for logs.
        mtu: Bytes, of our side.
        reads: READs that one of our queue pairs may have under way; 0: it cannot READ.
    """

    def __init__(
        self, verbs: Verbs, name: str, config: RdmaConfig, *, numa: int, cpus: frozenset[int] | None
    ) -> None:
        """Open the NIC.

        Args:
            verbs: The binding.
            name: Device name.
            config: Settings.
            numa: NUMA node; -1: not known.
            cpus: Where its threads run; None: anywhere.

        Raises:
            VerbsError: It cannot be opened, or gives less than the settings ask for.
            PathUnavailable: No GID that can be used (`gids.choose`).
        """
        self.config = config
        self._verbs = verbs
        with contextlib.ExitStack() as opening:
            self.device = verbs.open(name)
            opening.callback(self.device.close)
            self.limits = self.device.attributes()
            port = self.device.port(config.port)
            chosen = gids.choose(self.device.gids(config.port), config.gid_index, port.link_layer)
            self._gid_index, self.why_gid = chosen.gid_index, chosen.reason
            self.mtu = min(config.mtu, port.active_mtu)
            self.reads = min(config.max_rd_atomic, self.limits.max_qp_init_rd_atom)
            self.record = DeviceRecord(
                name=name,
                port=config.port,
                lid=port.lid,
                gid=chosen.raw,
                gid_kind=chosen.kind,
                link_layer=port.link_layer,
                active_mtu=port.active_mtu,
                numa_node=numa,
                can_read=self.reads > 0,
                max_dest_rd_atomic=self._served_reads,
            )
            self._open_queues(opening)
            self._workers = Workers(
                name, config.num_workers, self._channels, [*self._sends, self.receives], cpus
            )
            opening.callback(self._workers.close)
            self.receives.arm()
            self._opened = opening.pop_all()

    def _open_queues(self, opening: contextlib.ExitStack) -> None:
        config, device = self.config, self.device
        self._channels = []
        for _ in range(config.num_comp_channels):
            self._channels.append(device.channel())
            opening.callback(self._channels[-1].close)
        depth = min(config.max_cqe, self.limits.max_cqe)
        self._sends = []
        places = -(-config.max_outstanding // config.num_cq)
        for index in range(config.num_cq):
            channel = self._channels[index % len(self._channels)]
            self._sends.append(Completions(device, depth, channel, places))
            opening.callback(self._sends[-1].close)
        self.receives = Completions(device, depth, self._channels[0], depth, keep_armed=True)
        opening.callback(self.receives.close)
        self._turn = itertools.cycle(self._sends)
        self.caps = QueueCaps(
            max_send_wr=min(config.max_wr, self.limits.max_qp_wr),
            max_recv_wr=_RECEIVES,
            max_send_sge=min(config.max_sge, self.limits.max_sge),
            max_recv_sge=0,
            max_inline=config.max_inline,
        )

    @property
    def _served_reads(self) -> int:
        return max(1, min(self.config.max_dest_rd_atomic, self.limits.max_qp_rd_atom))

    @property
    def max_read_sge(self) -> int:
        """Scatter entries of one READ; often fewer than of a WRITE."""
        return max(1, min(self.caps.max_send_sge, self.limits.max_sge_rd or self.limits.max_sge))

    @property
    def completions(self) -> list[Completions]:
        """Of requests, to be polled by who waits for them."""
        return self._sends

    def text(self, status: int) -> str:
        """An ibv_wc_status in words."""
        return self._verbs.status_text(status)

    def remarks(self, peer: DeviceRecord) -> str:
        """What is unequal between our NIC and a peer's, to be told when they do not connect."""
        return gids.remarks(self.record, peer, self.config.mtu)

    def later(self, action: Callable[[], object]) -> None:
        """Run `action` on one of our threads."""
        self._workers.later(action)

    def queue_pair(self) -> tuple[QueuePair, Completions]:
        """A new queue pair, and what its requests complete into. Raises `VerbsError`."""
        completions = next(self._turn)
        caps = self.caps
        while True:
            try:
                return self.device.queue_pair(
                    completions.queue, self.receives.queue, caps
                ), completions
            except VerbsError:
                # What a device takes inline depends on the rest of the queue: halve until it fits.
                if not caps.max_inline:
                    raise
                caps = caps._replace(max_inline=caps.max_inline // 2)

    def to_init(self, queue_pair: QueuePair) -> None:
        """RESET -> INIT with our port, P_Key and permissions. Raises `VerbsError`."""
        queue_pair.to_init(self.config.port, self.config.pkey_index, _ACCESS)

    def connect(
        self,
        queue_pair: QueuePair,
        peer: DeviceRecord,
        address: QueueAddress,
        psn: int,
        *,
        mtu: int,
        reads: int,
    ) -> None:
        """INIT -> RTR -> RTS towards one queue pair of a peer's NIC. Raises `VerbsError`.

        Args:
            queue_pair: Ours.
            peer: The NIC of the other one.
            address: The other one.
            psn: What ours sends first.
            mtu: Agreed on, bytes.
            reads: READs that the other one serves at once.
        """
        config = self.config
        queue_pair.to_rtr(
            RemoteQueue(
                number=address.number,
                rq_psn=address.psn,
                lid=peer.lid,
                gid=peer.gid,
                sgid_index=self._gid_index,
                port=config.port,
                mtu=mtu,
                max_dest_rd_atomic=self._served_reads,
                min_rnr_timer=config.min_rnr_timer,
                traffic_class=max(0, config.traffic_class),
                service_level=max(0, config.service_level),
                hop_limit=config.hop_limit,
                flow_label=config.flow_label,
                src_path_bits=config.src_path_bits,
                static_rate=config.static_rate,
                is_global=self.record.link_layer != "infiniband" or gids.crosses(self.record, peer),
            )
        )
        queue_pair.to_rts(
            SendLimits(
                sq_psn=psn,
                timeout=config.send_timeout,
                retry_count=config.send_retry_count,
                rnr_retry=config.send_rnr_count,
                max_rd_atomic=max(1, min(self.reads, reads)),
            )
        )

    def close(self) -> None:
        """End the threads and close the device, after its queue pairs and regions. Idempotent."""
        self._opened.close()
