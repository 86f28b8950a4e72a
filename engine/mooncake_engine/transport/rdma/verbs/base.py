"""The thin seam over libibverbs: what the transport asks of a binding, and nothing else.

Two bindings keep it: `native` (ctypes and numpy on libibverbs.so.1, the default) and `pyverbs`
(the distribution's python3-pyverbs). Rules for both:

* Calls raise `VerbsError` with the errno and what was attempted; none blocks, but for
  registration, which pins pages.
* No call holds the interpreter lock while it waits: completion channels are non-blocking, and
  whoever waits polls `Channel.fileno()` first.
* `poll` and `post` of one queue are not called by two threads at once; the caller holds a lock.
* Whoever opens, closes: regions, queue pairs, queues, channels, then the device. `close` is
  idempotent.
"""

from __future__ import annotations

import abc
import enum
import ipaddress
import os
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
from typing_extensions import override

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Work completions as `poll` fills them. `status` is an ibv_wc_status (0: success, 5: flushed),
#: `imm` is valid when `received` is 1. A failed completion has a valid wr_id, status and qp_num.
COMPLETION = np.dtype(
    [
        ("wr_id", "u8"),
        ("status", "i4"),
        ("vendor_error", "u4"),
        ("qp_num", "u4"),
        ("imm", "u4"),
        ("received", "u1"),
        ("pad", "u1", (7,)),
    ]
)


class VerbsError(OSError):
    """A verbs call failed; `errno` says why."""

    def __init__(self, code: int, attempted: str) -> None:
        super().__init__(code, f"{attempted}: {os.strerror(code) if code else 'failed'}")


class VerbsMissing(Exception):
    """This binding cannot be loaded here; the message says what to install."""


class Opcode(enum.IntEnum):
    """ibv_wr_opcode."""

    WRITE = 0
    WRITE_WITH_IMM = 1
    READ = 4


class Access(enum.IntFlag):
    """ibv_access_flags."""

    LOCAL_WRITE = 1
    REMOTE_WRITE = 2
    REMOTE_READ = 4
    RELAXED_ORDERING = 1 << 20  # optional: providers that do not know it ignore it


class DeviceAttributes(NamedTuple):
    """Limits of a device (ibv_device_attr)."""

    max_qp: int
    max_qp_wr: int
    max_sge: int
    max_sge_rd: int  # scatter/gather entries of a READ; 0: the device reports none, take max_sge
    max_cq: int
    max_cqe: int
    max_mr: int
    max_mr_size: int
    max_qp_rd_atom: int  # READs that a queue pair serves at once
    max_qp_init_rd_atom: int  # READs that a queue pair has under way; 0: it cannot READ
    phys_port_cnt: int


class PortAttributes(NamedTuple):
    """One port (ibv_port_attr)."""

    state: int  # 4: active. No proof of anything: rxe moves bytes while it is down
    active_mtu: int  # bytes
    lid: int
    link_layer: str  # "infiniband" or "ethernet"
    gid_table_length: int
    pkey_table_length: int
    active_speed: int  # ibv_port_attr.active_speed and active_width, as they are
    active_width: int


class GidEntry(NamedTuple):
    """One row of a port's GID table."""

    gid_index: int
    raw: bytes  # 16
    kind: str  # "ib", "roce_v1" or "roce_v2"
    netdev: str  # empty when unknown


class QueueCaps(NamedTuple):
    """ibv_qp_cap. The device may grant more than was asked for, which `QueuePair.caps` tells."""

    max_send_wr: int
    max_recv_wr: int
    max_send_sge: int
    max_recv_sge: int
    max_inline: int


class RemoteQueue(NamedTuple):
    """What a queue pair must know of its peer and of the path to become ready to receive."""

    number: int
    rq_psn: int  # the PSN that the peer sends first
    lid: int
    gid: bytes  # 16
    sgid_index: int
    port: int
    mtu: int  # bytes
    max_dest_rd_atomic: int
    min_rnr_timer: int
    traffic_class: int
    service_level: int
    hop_limit: int
    flow_label: int
    src_path_bits: int
    static_rate: int
    is_global: bool  # RoCE always; InfiniBand across subnets

    @override
    def __str__(self) -> str:
        """What an error needs to say of it."""
        where = ipaddress.IPv6Address(self.gid)
        return f"towards {where.ipv4_mapped or where} or LID {self.lid}, MTU {self.mtu}"


class SendLimits(NamedTuple):
    """What makes a queue pair ready to send."""

    sq_psn: int
    timeout: int
    retry_count: int
    rnr_retry: int
    max_rd_atomic: int


class Work:
    """`n` work requests as columns; `m` >= n scatter/gather entries, in the same order.

    A device's keys come in when it is posted: the same work goes over any rail.
    """

    __slots__ = ("local", "local_length", "remote", "sge_count", "sge_first")

    def __init__(
        self,
        remote: NDArray[np.uint64],
        sge_first: NDArray[np.int64],
        sge_count: NDArray[np.int64],
        local: NDArray[np.uint64],
        local_length: NDArray[np.uint32],
    ) -> None:
        """Args: shapes (n,), (n,), (n,), (m,), (m,); a request takes its bytes from `remote` on."""
        self.remote = remote
        self.sge_first = sge_first
        self.sge_count = sge_count
        self.local = local
        self.local_length = local_length


class MemoryRegion(abc.ABC):
    """One registration on one device."""

    lkey: int
    rkey: int

    @abc.abstractmethod
    def close(self) -> None:
        """ibv_dereg_mr; idempotent."""


class Channel(abc.ABC):
    """A completion channel, non-blocking."""

    @abc.abstractmethod
    def fileno(self) -> int:
        """Readable when an armed queue of this channel got a completion."""

    @abc.abstractmethod
    def drain(self) -> None:
        """Take and acknowledge all events that are there; none is fine."""

    @abc.abstractmethod
    def close(self) -> None:
        """After its completion queues; idempotent."""


class CompletionQueue(abc.ABC):
    """Where completions arrive."""

    depth: int  # as granted

    @abc.abstractmethod
    def arm(self) -> None:
        """Wake the channel at the next completion (ibv_req_notify_cq); then poll once more."""

    @abc.abstractmethod
    def poll(self, into: NDArray[np.void]) -> int:
        """Fill a `COMPLETION` array from its start; returns how many."""

    @abc.abstractmethod
    def close(self) -> None:
        """After its queue pairs; idempotent."""


class QueuePair(abc.ABC):
    """An RC queue pair. sq_sig_all is 0: only requests that ask for it complete visibly."""

    number: int
    caps: QueueCaps  # as granted

    @abc.abstractmethod
    def to_init(self, port: int, pkey_index: int, access: Access) -> None:
        """RESET -> INIT."""

    @abc.abstractmethod
    def to_rtr(self, peer: RemoteQueue) -> None:
        """INIT -> RTR."""

    @abc.abstractmethod
    def to_rts(self, limits: SendLimits) -> None:
        """RTR -> RTS."""

    @abc.abstractmethod
    def to_error(self) -> None:
        """Any -> ERR: all that is under way completes as flushed."""

    @abc.abstractmethod
    def query(self) -> dict[str, int]:
        """ibv_query_qp, by its C names.

        qp_state, path_mtu (bytes), rq_psn, sq_psn, dest_qp_num, timeout, retry_cnt, rnr_retry,
        max_rd_atomic, max_dest_rd_atomic, min_rnr_timer, port_num, pkey_index, traffic_class, sl,
        hop_limit, flow_label, sgid_index, max_send_wr, max_send_sge, max_inline_data.
        """

    @abc.abstractmethod
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
        """Post one chain: the rows `start:stop` of `work`, in order. One system call at most.

        Args:
            opcode: READ or WRITE.
            work: Columns.
            rows: start and stop; at most `caps.max_send_wr` of them.
            lkeys: Shape (m,), one for each scatter/gather entry of `work`.
            rkeys: Shape (n,), one for each request of `work`.
            wr_id: Of the first request; each further one counts one up.
            signal_every: Each such row completes visibly; the last one always does.
            inline: WRITEs of at most so many bytes are copied when posted. 0: none.

        Returns:
            How many were accepted, from the start of `rows`. Fewer than asked for: the queue is
            full. The last accepted one then may be unsignalled.

        Raises:
            VerbsError: Anything but a full queue; nothing of the chain was accepted.
        """

    @abc.abstractmethod
    def post_imm(self, imm: int, data: bytes, remote: int, rkey: int, *, wr_id: int) -> None:
        """Post one inline WRITE_WITH_IMM of `data` (may be empty), signalled."""

    @abc.abstractmethod
    def post_receive(self, wr_id: int) -> None:
        """Post one receive without a buffer, for a WRITE_WITH_IMM."""

    @abc.abstractmethod
    def close(self) -> None:
        """ibv_destroy_qp; idempotent. Completions still queued are dropped."""


class Device(abc.ABC):
    """An open device with one protection domain."""

    name: str

    @abc.abstractmethod
    def attributes(self) -> DeviceAttributes:
        """Its limits."""

    @abc.abstractmethod
    def port(self, number: int) -> PortAttributes:
        """One port."""

    @abc.abstractmethod
    def gids(self, port: int) -> list[GidEntry]:
        """The port's GIDs that are set."""

    @abc.abstractmethod
    def register(self, address: int, length: int, access: Access) -> MemoryRegion:
        """ibv_reg_mr_iova2 with iova = address. Pins the pages."""

    @abc.abstractmethod
    def register_dmabuf(
        self, fd: int, offset: int, length: int, address: int, access: Access
    ) -> MemoryRegion:
        """ibv_reg_dmabuf_mr of `length` bytes from `offset` of the buffer; iova = address."""

    @abc.abstractmethod
    def channel(self) -> Channel:
        """A new completion channel."""

    @abc.abstractmethod
    def completion_queue(self, depth: int, channel: Channel) -> CompletionQueue:
        """A new completion queue."""

    @abc.abstractmethod
    def queue_pair(
        self, send: CompletionQueue, receive: CompletionQueue, caps: QueueCaps
    ) -> QueuePair:
        """A new RC queue pair in RESET."""

    @abc.abstractmethod
    def close(self) -> None:
        """Free the protection domain and close the device; idempotent."""


class Verbs(abc.ABC):
    """One binding."""

    name: ClassVar[str]

    @abc.abstractmethod
    def device_names(self) -> list[str]:
        """Devices here; empty too where the kernel has no RDMA."""

    @abc.abstractmethod
    def open(self, name: str) -> Device:
        """Open one. Raises `VerbsError`; `LookupError` when there is none of that name."""

    @abc.abstractmethod
    def status_text(self, status: int) -> str:
        """What an ibv_wc_status means, in the library's words."""
