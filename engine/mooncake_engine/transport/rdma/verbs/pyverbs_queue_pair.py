"""Queue pairs of the pyverbs binding."""

from __future__ import annotations

import errno
import socket
from typing import TYPE_CHECKING, Any

import numpy as np
from typing_extensions import override

from mooncake_engine.transport.rdma.verbs import abi
from mooncake_engine.transport.rdma.verbs import pyverbs_calls as calls
from mooncake_engine.transport.rdma.verbs.base import (
    Access,
    Opcode,
    QueueCaps,
    QueuePair,
    RemoteQueue,
    SendLimits,
    VerbsError,
    Work,
)
from mooncake_engine.transport.rdma.verbs.pyverbs_calls import attempting
from mooncake_engine.transport.rdma.verbs.pyverbs_chain import Chain
from mooncake_engine.transport.rdma.verbs.pyverbs_slots import Slots

if TYPE_CHECKING:
    from numpy.typing import NDArray

# What `query` tells of ibv_qp_attr and of its ibv_ah_attr.
_QUEUE_PAIR = (
    *("qp_state", "rq_psn", "sq_psn", "dest_qp_num", "timeout", "retry_cnt", "rnr_retry"),
    *("max_rd_atomic", "max_dest_rd_atomic", "min_rnr_timer", "port_num", "pkey_index"),
)
_PATH = ("traffic_class", "hop_limit", "flow_label", "sgid_index")


class PyVerbsQueuePair(QueuePair):
    """A pyverbs QP."""

    def __init__(self, made: calls.qp.QP, caps: QueueCaps, slots: dict[int, Slots]) -> None:
        """Args: slots: of the completion queue of its requests, by queue pair number."""
        self._made: Any = made  # None: closed
        self.number = int(made.qp_num)
        self.caps = caps
        self._what = f"queue pair {self.number}"
        self._chain = Chain(caps.max_send_wr)
        self._slots = slots[self.number] = Slots(caps.max_send_wr)
        self._all_slots = slots

    @override
    def to_init(self, port: int, pkey_index: int, access: Access) -> None:
        wanted = calls.qp.QPAttr(qp_state=abi.STATE_INIT, port_num=port)
        wanted.pkey_index = pkey_index
        wanted.qp_access_flags = int(access)
        mask = abi.MASK_STATE | abi.MASK_PORT | abi.MASK_PKEY_INDEX | abi.MASK_ACCESS
        self._modify(wanted, mask, f"to INIT (port {port}, P_Key index {pkey_index})")

    @override
    def to_rtr(self, peer: RemoteQueue) -> None:
        wanted = calls.qp.QPAttr(qp_state=abi.STATE_RTR, port_num=peer.port)
        wanted.path_mtu = abi.mtu_code(peer.mtu)
        wanted.dest_qp_num = peer.number
        wanted.rq_psn = peer.rq_psn
        wanted.max_dest_rd_atomic = peer.max_dest_rd_atomic
        wanted.min_rnr_timer = peer.min_rnr_timer
        wanted.ah_attr = _path(peer)
        mask = abi.MASK_STATE | abi.MASK_AV | abi.MASK_PATH_MTU | abi.MASK_DEST_QPN
        mask |= abi.MASK_RQ_PSN | abi.MASK_MAX_DEST_RD_ATOMIC | abi.MASK_MIN_RNR_TIMER
        self._modify(wanted, mask, f"to RTR ({peer})")

    @override
    def to_rts(self, limits: SendLimits) -> None:
        wanted = calls.qp.QPAttr(qp_state=abi.STATE_RTS)
        wanted.sq_psn = limits.sq_psn
        wanted.timeout = limits.timeout
        wanted.retry_cnt = limits.retry_count
        wanted.rnr_retry = limits.rnr_retry
        wanted.max_rd_atomic = limits.max_rd_atomic
        mask = abi.MASK_STATE | abi.MASK_SQ_PSN | abi.MASK_TIMEOUT | abi.MASK_RETRY_CNT
        mask |= abi.MASK_RNR_RETRY | abi.MASK_MAX_RD_ATOMIC
        self._modify(wanted, mask, f"to RTS ({limits})")

    @override
    def to_error(self) -> None:
        self._modify(calls.qp.QPAttr(qp_state=abi.STATE_ERR), abi.MASK_STATE, "to ERR")

    def _modify(self, wanted: calls.qp.QPAttr, mask: int, to: str) -> None:
        with attempting(f"taking {self._what} {to}"):
            self._made.modify(wanted, mask)

    @override
    def query(self) -> dict[str, int]:
        with attempting(f"asking for the attributes of {self._what}"):
            found, made = self._made.query(abi.MASK_ALL)
        path = found.ah_attr
        attributes = {name: int(getattr(found, name)) for name in _QUEUE_PAIR}
        # pyverbs has None for the fields of a path that is not global
        attributes |= {name: int(getattr(path, name) or 0) for name in _PATH}
        attributes["sl"] = int(path.sl)
        attributes["path_mtu"] = abi.mtu_bytes(found.path_mtu)
        for name in ("max_send_wr", "max_send_sge", "max_inline_data"):
            attributes[name] = int(getattr(made.cap, name))
        return attributes

    @override
    def post(
        self,
        opcode: Opcode,
        work: Work,
        rows: slice,
        lkeys: NDArray[np.uint32],
        rkeys: NDArray[np.uint32],
        *,
        wr_id: int,
        signal_every: int,
        inline: int,
    ) -> int:
        count: int = min(rows.stop - rows.start, self._slots.free)
        if not count:
            return 0
        entries = int(work.sge_count[rows].max())
        attempted = f"posting {count} {opcode.name}s to {self._what}"
        if entries > self.caps.max_send_sge:
            raise VerbsError(
                errno.EINVAL, f"{attempted} ({entries} entries of {self.caps.max_send_sge})"
            )
        first = self._chain.fill(
            opcode,
            work,
            slice(rows.start, rows.start + count),
            lkeys,
            rkeys,
            wr_id=wr_id,
            signal_every=signal_every,
            inline=inline,
        )
        try:
            self._post(first, count, signal_every, attempted)
        finally:
            self._chain.release()
        return count

    def _post(self, first: calls.wr.SendWR, count: int, signal_every: int, attempted: str) -> None:
        self._slots.take(count, signal_every)  # first: a completion may come before we return
        try:
            with attempting(attempted):
                self._made.post_send(first)
        except VerbsError:
            self._slots.give_back(count, signal_every)
            raise

    @override
    def post_imm(self, imm: int, data: bytes, remote: int, rkey: int, *, wr_id: int) -> None:
        source = np.frombuffer(data or b"\0", np.uint8)
        entry = calls.wr.SGE(source.ctypes.data, len(data), 0)
        request = calls.wr.SendWR(
            wr_id=wr_id,
            opcode=int(Opcode.WRITE_WITH_IMM),
            num_sge=1,
            imm_data=socket.htonl(imm),
            sg=[entry],
            send_flags=abi.SEND_SIGNALED | abi.SEND_INLINE,
        )
        try:
            request.num_sge = 1 if data else 0  # pyverbs makes none without an entry
            request.set_wr_rdma(rkey, remote)
            attempted = f"posting a WRITE_WITH_IMM to {self._what}"
            if not self._slots.free:
                raise VerbsError(errno.ENOMEM, attempted)
            self._post(request, 1, 1, attempted)
        finally:
            request.close()
            entry.close()

    @override
    def post_receive(self, wr_id: int) -> None:
        entry = calls.wr.SGE(0, 0, 0)
        request = calls.wr.RecvWR(wr_id=wr_id, num_sge=1, sg=[entry])
        try:
            request.num_sge = 0
            with attempting(f"posting a receive to {self._what}"):
                self._made.post_recv(request)
        finally:
            request.close()
            entry.close()

    @override
    def close(self) -> None:
        made, self._made = self._made, None
        if made is not None:
            with attempting(f"closing {self._what}"):
                made.close()
            del self._all_slots[self.number]
            self._chain.close()


def _path(peer: RemoteQueue) -> calls.addr.AHAttr:
    """The ibv_ah_attr of a peer."""
    words = (peer.gid.hex()[start : start + 4] for start in range(0, 32, 4))
    route = calls.addr.GlobalRoute(
        dgid=calls.addr.GID(":".join(words)),
        flow_label=peer.flow_label,
        sgid_index=peer.sgid_index,
        hop_limit=peer.hop_limit,
        traffic_class=peer.traffic_class,
    )
    return calls.addr.AHAttr(
        dlid=peer.lid,
        sl=peer.service_level,
        src_path_bits=peer.src_path_bits,
        static_rate=peer.static_rate,
        is_global=peer.is_global,
        port_num=peer.port,
        gr=route,
    )
