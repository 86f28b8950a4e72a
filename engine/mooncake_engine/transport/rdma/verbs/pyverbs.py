"""Verbs by the distribution's python3-pyverbs: another way into the same library.

For those who must have it, and as a second opinion on `native`: both keep one seam and pass one
set of tests. It costs an object for each work request and for each completion, and all its calls
hold the interpreter lock, memory registration too (docs/verbs-bindings.md has the figures).
"""

from __future__ import annotations

import errno
import socket
from typing import Any, ClassVar

from typing_extensions import override

from mooncake_engine.transport.rdma.verbs import abi
from mooncake_engine.transport.rdma.verbs import pyverbs_calls as calls
from mooncake_engine.transport.rdma.verbs.base import (
    Access,
    Channel,
    CompletionQueue,
    Device,
    DeviceAttributes,
    GidEntry,
    MemoryRegion,
    PortAttributes,
    QueueCaps,
    QueuePair,
    Verbs,
    VerbsError,
)
from mooncake_engine.transport.rdma.verbs.pyverbs_calls import attempting
from mooncake_engine.transport.rdma.verbs.pyverbs_queue_pair import PyVerbsQueuePair
from mooncake_engine.transport.rdma.verbs.pyverbs_queues import (
    PyVerbsChannel,
    PyVerbsCompletionQueue,
)


class PyVerbs(Verbs):
    """The binding that `MC_VERBS_BINDING=pyverbs` chooses."""

    name: ClassVar[str] = "pyverbs"

    @override
    def device_names(self) -> list[str]:
        try:
            with attempting("listing RDMA devices"):
                return [found.name.decode() for found in calls.device.get_device_list()]
        except VerbsError as error:
            if error.errno:
                raise
            return []  # no RDMA in the kernel is the one failure; pyverbs does not give its errno

    @override
    def open(self, name: str) -> Device:
        there = self.device_names()
        if name not in there:
            raise LookupError(
                f"no RDMA device {name!r} here; there are: {', '.join(there) or 'none'}"
            )
        with attempting(f"opening {name}"):
            return PyVerbsDevice(name, calls.device.Context(name=name))

    @override
    def status_text(self, status: int) -> str:
        return str(calls.cq.cqe_status_to_str(status))


class PyVerbsDevice(Device):
    """A pyverbs Context and a PD."""

    def __init__(self, name: str, context: calls.device.Context) -> None:
        self.name = name
        self._context: Any = context  # None: closed
        with attempting(f"a protection domain on {name}"):
            self._protection = calls.pd.PD(context)

    @override
    def attributes(self) -> DeviceAttributes:
        with attempting(f"asking {self.name} for its limits"):
            found = self._context.query_device()
        return DeviceAttributes(*(getattr(found, name) for name in DeviceAttributes._fields))

    @override
    def port(self, number: int) -> PortAttributes:
        with attempting(f"asking {self.name} about its port {number}"):
            found = self._context.query_port(number)
        return PortAttributes(
            state=found.state,
            active_mtu=abi.mtu_bytes(found.active_mtu),
            lid=found.lid,
            link_layer=abi.LINK_LAYERS.get(found.link_layer, "infiniband"),
            gid_table_length=found.gid_tbl_len,
            pkey_table_length=found.pkey_tbl_len,
            active_speed=found.active_speed,
            active_width=found.active_width,
        )

    @override
    def gids(self, port: int) -> list[GidEntry]:
        # The table is the device's, of all ports; a call with too little room for it fails.
        with attempting(f"reading the GID table of {self.name}"):
            table = self._context.query_gid_table(1024)
        return [
            GidEntry(
                row.gid_index,
                bytes.fromhex(row.gid_str().replace(":", "")),
                abi.GID_KINDS[row.gid_type],
                _netdev(row.ndev_ifindex),
            )
            for row in table
            if row.port_num == port
        ]

    @override
    def register(self, address: int, length: int, access: Access) -> MemoryRegion:
        attempted = f"registering {length} bytes at {address:#x} with {self.name}"
        if not address:  # pyverbs would allocate memory of its own
            raise VerbsError(errno.EFAULT, attempted)
        with attempting(attempted):
            made = calls.mr.MR(self._protection, length, int(access), address=address)
        return PyVerbsMemoryRegion(made)

    @override
    def register_dmabuf(
        self, fd: int, offset: int, length: int, address: int, access: Access
    ) -> MemoryRegion:
        raise VerbsError(
            errno.EOPNOTSUPP,
            f"registering {length} bytes of DMA-BUF at {address:#x} with {self.name}: pyverbs can "
            "register them at address 0 only, where no peer would look for them; GPU memory needs "
            "rdma.binding native (MC_VERBS_BINDING=native)",
        )

    @override
    def channel(self) -> Channel:
        return PyVerbsChannel(self._context, self.name)

    @override
    def completion_queue(self, depth: int, channel: Channel) -> CompletionQueue:
        assert isinstance(channel, PyVerbsChannel)
        return PyVerbsCompletionQueue(self._context, self.name, depth, channel)

    @override
    def queue_pair(
        self, send: CompletionQueue, receive: CompletionQueue, caps: QueueCaps
    ) -> QueuePair:
        assert isinstance(send, PyVerbsCompletionQueue)
        assert isinstance(receive, PyVerbsCompletionQueue)
        wanted = calls.qp.QPInitAttr(
            qp_type=abi.TYPE_RC,
            scq=send.queue,
            rcq=receive.queue,
            cap=calls.qp.QPCap(*caps),
            sq_sig_all=0,  # pyverbs' default is 1
        )
        with attempting(f"a queue pair on {self.name} with {caps}"):
            made = calls.qp.QP(self._protection, wanted)
        granted = QueueCaps(*(getattr(wanted.cap, name) for name in abi.CAPS))
        return PyVerbsQueuePair(made, granted, send.slots)

    @override
    def close(self) -> None:
        context, self._context = self._context, None
        if context is not None:
            with attempting(f"closing {self.name}"):
                self._protection.close()
                context.close()


def _netdev(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:  # InfiniBand has none; a container may not see it
        return ""


class PyVerbsMemoryRegion(MemoryRegion):
    """A pyverbs MR over memory that is not its own."""

    def __init__(self, made: calls.mr.MR) -> None:
        self._made: Any = made  # None: closed
        self.lkey = int(made.lkey)
        self.rkey = int(made.rkey)

    @override
    def close(self) -> None:
        made, self._made = self._made, None
        if made is not None:
            with attempting("deregistering memory"):
                made.close()
