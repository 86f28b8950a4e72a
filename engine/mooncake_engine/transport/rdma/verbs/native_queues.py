"""Channels, completion queues and queue pairs of the native binding: the data path.

Posting and polling keep the interpreter lock: they take less than giving it up does, which beside
a busy thread costs up to 5 ms. (But for posting to devices in software, see `NativeDevice`.)
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import TYPE_CHECKING

import numpy as np
from typing_extensions import override

from mooncake_engine.transport.rdma.verbs import abi
from mooncake_engine.transport.rdma.verbs.base import (
    Access,
    Channel,
    CompletionQueue,
    Opcode,
    QueueCaps,
    QueuePair,
    RemoteQueue,
    SendLimits,
    VerbsError,
    Work,
)
from mooncake_engine.transport.rdma.verbs.calls import done, u32
from mooncake_engine.transport.rdma.verbs.chain import Chain

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    #: (offset in ibv_context, result and arguments) -> the function there
    Functions = Callable[..., Callable[..., int]]

_int, _pointer = ctypes.c_int, abi.Pointer

# What `query` tells of ibv_qp_attr and of its ibv_ah_attr.
_QUEUE_PAIR = (
    *("qp_state", "rq_psn", "sq_psn", "dest_qp_num", "timeout", "retry_cnt", "rnr_retry"),
    *("max_rd_atomic", "max_dest_rd_atomic", "min_rnr_timer", "port_num", "pkey_index"),
)
_PATH = ("traffic_class", "sl", "hop_limit", "flow_label", "sgid_index")


class NativeChannel(Channel):
    """An ibv_comp_channel."""

    def __init__(self, library: ctypes.CDLL, pointer: int) -> None:
        self._library = library
        self.pointer: int | None = pointer
        self._fd = u32(pointer + abi.CHANNEL_FD)
        os.set_blocking(self._fd, False)

    @override
    def fileno(self) -> int:
        return self._fd

    @override
    def drain(self) -> None:
        queue, context = _pointer(), _pointer()
        while not self._library.ibv_get_cq_event(
            self.pointer, ctypes.byref(queue), ctypes.byref(context)
        ):
            self._library.ibv_ack_cq_events(queue, 1)

    @override
    def close(self) -> None:
        pointer, self.pointer = self.pointer, None
        if pointer is not None:
            done(self._library.ibv_destroy_comp_channel(pointer), "closing a completion channel")


class NativeCompletionQueue(CompletionQueue):
    """An ibv_cq."""

    def __init__(self, library: ctypes.CDLL, functions: Functions, pointer: int) -> None:
        self._library = library
        self.pointer: int | None = pointer
        self.depth = u32(pointer + abi.CQ_CQE)
        self._poll = functions(abi.CONTEXT_POLL_CQ, _int, _pointer, _int, _pointer)
        self._arm = functions(abi.CONTEXT_REQ_NOTIFY_CQ, _int, _pointer, _int)
        self._found = np.zeros(256, abi.WC)
        self._address = self._found.ctypes.data

    @override
    def arm(self) -> None:
        done(self._arm(self.pointer, 0), "arming a completion queue")

    @override
    def poll(self, into: NDArray[np.void]) -> int:
        room = min(into.size, self._found.size)
        count = self._poll(self.pointer, room, self._address)
        if count <= 0:
            if count:
                raise VerbsError(abs(count), "polling a completion queue")
            return 0
        found, filled = self._found[:count], into[:count]
        filled["wr_id"] = found["wr_id"]
        filled["status"] = found["status"]
        filled["vendor_error"] = found["vendor_err"]
        filled["qp_num"] = found["qp_num"]
        filled["imm"] = found["imm_data"]
        filled["received"] = (found["opcode"] == abi.WC_RECV_RDMA_WITH_IMM) & (
            found["wc_flags"] & abi.WC_WITH_IMM != 0
        )
        return count

    @override
    def close(self) -> None:
        pointer, self.pointer = self.pointer, None
        if pointer is not None:
            done(self._library.ibv_destroy_cq(pointer), "closing a completion queue")


class NativeQueuePair(QueuePair):
    """An ibv_qp, and the arrays that its chains are written into."""

    def __init__(
        self, library: ctypes.CDLL, functions: Functions, pointer: int, caps: QueueCaps
    ) -> None:
        self._library = library
        self._pointer: int | None = pointer
        self._what = f"queue pair {u32(pointer + abi.QP_NUM)}"
        self.number = u32(pointer + abi.QP_NUM)
        self.caps = caps
        self._send = functions(
            abi.CONTEXT_POST_SEND, _int, _pointer, _pointer, ctypes.POINTER(_pointer)
        )
        self._receive = functions(
            abi.CONTEXT_POST_RECV, _int, _pointer, _pointer, ctypes.POINTER(_pointer)
        )
        self._chain = Chain(caps.max_send_wr, max(1, caps.max_send_sge))
        self._bad = _pointer()

    @override
    def to_init(self, port: int, pkey_index: int, access: Access) -> None:
        wanted = abi.QpAttr(
            qp_state=abi.STATE_INIT,
            port_num=port,
            pkey_index=pkey_index,
            qp_access_flags=int(access),
        )
        self._modify(
            wanted,
            abi.MASK_STATE | abi.MASK_PORT | abi.MASK_PKEY_INDEX | abi.MASK_ACCESS,
            f"to INIT (port {port}, P_Key index {pkey_index})",
        )

    @override
    def to_rtr(self, peer: RemoteQueue) -> None:
        wanted = abi.QpAttr(
            qp_state=abi.STATE_RTR,
            path_mtu=abi.mtu_code(peer.mtu),
            dest_qp_num=peer.number,
            rq_psn=peer.rq_psn,
            max_dest_rd_atomic=peer.max_dest_rd_atomic,
            min_rnr_timer=peer.min_rnr_timer,
            ah=abi.AhAttr(
                dgid=(ctypes.c_uint8 * 16)(*peer.gid),
                flow_label=peer.flow_label,
                sgid_index=peer.sgid_index,
                hop_limit=peer.hop_limit,
                traffic_class=peer.traffic_class,
                dlid=peer.lid,
                sl=peer.service_level,
                src_path_bits=peer.src_path_bits,
                static_rate=peer.static_rate,
                is_global=peer.is_global,
                port_num=peer.port,
            ),
        )
        mask = abi.MASK_STATE | abi.MASK_AV | abi.MASK_PATH_MTU | abi.MASK_DEST_QPN
        mask |= abi.MASK_RQ_PSN | abi.MASK_MAX_DEST_RD_ATOMIC | abi.MASK_MIN_RNR_TIMER
        self._modify(wanted, mask, f"to RTR ({peer})")

    @override
    def to_rts(self, limits: SendLimits) -> None:
        wanted = abi.QpAttr(
            qp_state=abi.STATE_RTS,
            sq_psn=limits.sq_psn,
            timeout=limits.timeout,
            retry_cnt=limits.retry_count,
            rnr_retry=limits.rnr_retry,
            max_rd_atomic=limits.max_rd_atomic,
        )
        mask = abi.MASK_STATE | abi.MASK_SQ_PSN | abi.MASK_TIMEOUT | abi.MASK_RETRY_CNT
        mask |= abi.MASK_RNR_RETRY | abi.MASK_MAX_RD_ATOMIC
        self._modify(wanted, mask, f"to RTS ({limits})")

    @override
    def to_error(self) -> None:
        self._modify(abi.QpAttr(qp_state=abi.STATE_ERR), abi.MASK_STATE, "to ERR")

    def _modify(self, wanted: abi.QpAttr, mask: int, to: str) -> None:
        result = self._library.ibv_modify_qp(self._pointer, ctypes.byref(wanted), mask)
        done(result, f"taking {self._what} {to}")

    @override
    def query(self) -> dict[str, int]:
        found, made = abi.QpAttr(), abi.QpInitAttr()
        result = self._library.ibv_query_qp(
            self._pointer, ctypes.byref(found), abi.MASK_ALL, ctypes.byref(made)
        )
        done(result, f"asking for the attributes of {self._what}")
        attributes = {name: getattr(found, name) for name in _QUEUE_PAIR}
        attributes |= {name: getattr(found.ah, name) for name in _PATH}
        attributes["path_mtu"] = abi.mtu_bytes(found.path_mtu)
        for name in ("max_send_wr", "max_send_sge", "max_inline_data"):
            attributes[name] = getattr(made.cap, name)
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
        count = self._chain.fill(
            opcode, work, rows, lkeys, rkeys, wr_id=wr_id, signal_every=signal_every, inline=inline
        )
        result = self._send(self._pointer, self._chain.address, ctypes.byref(self._bad))
        self._chain.rejoin(count)
        if not result:
            return count
        # NULL when the doorbell failed, and not a request: rxe's, of a queue pair that is not ready
        first_refused = self._bad.value or self._chain.address
        accepted: int = (first_refused - self._chain.address) // abi.SEND_WR.itemsize
        if result == errno.ENOMEM or accepted:
            return accepted
        raise VerbsError(result, f"posting {count} {opcode.name}s to {self._what}")

    @override
    def post_imm(self, imm: int, data: bytes, remote: int, rkey: int, *, wr_id: int) -> None:
        source = np.frombuffer(data, np.uint8) if data else np.zeros(0, np.uint8)
        self._chain.fill_imm(imm, source, remote, rkey, wr_id)
        result = self._send(self._pointer, self._chain.address, ctypes.byref(self._bad))
        self._chain.rejoin(1)
        done(result, f"posting a WRITE_WITH_IMM to {self._what}")

    @override
    def post_receive(self, wr_id: int) -> None:
        wanted = np.zeros(1, abi.RECV_WR)
        wanted["wr_id"] = wr_id
        result = self._receive(self._pointer, wanted.ctypes.data, ctypes.byref(self._bad))
        done(result, f"posting a receive to {self._what}")

    @override
    def close(self) -> None:
        pointer, self._pointer = self._pointer, None
        if pointer is not None:
            done(self._library.ibv_destroy_qp(pointer), f"closing {self._what}")
