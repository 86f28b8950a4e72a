"""Verbs by ctypes and numpy on libibverbs.so.1: nothing to build, any rdma-core since 2020.

The control path calls exported functions. The data path (post_send, poll_cq) is inline in
<infiniband/verbs.h>, that is, a call of a function pointer in the device's context; it is called
by that pointer here too (`native_queues`). A chain of work requests is one numpy array
(`chain`): 17 to 45 ns a request, where an object for each costs 1 to 4 us.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import socket
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from mooncake_engine.transport.rdma.verbs import abi
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
from mooncake_engine.transport.rdma.verbs.calls import done, load, made, u32
from mooncake_engine.transport.rdma.verbs.native_queues import (
    NativeChannel,
    NativeCompletionQueue,
    NativeQueuePair,
)

if TYPE_CHECKING:
    from collections.abc import Callable


class NativeVerbs(Verbs):
    """The default binding."""

    name: ClassVar[str] = "native"

    def __init__(self) -> None:
        """Raises `VerbsMissing`."""
        self._library = load()

    @override
    def device_names(self) -> list[str]:
        with contextlib.suppress(VerbsError):  # ENOSYS where the kernel has no RDMA
            return [name for name, _ in self._list(lambda device: device)]
        return []

    @override
    def open(self, name: str) -> Device:
        library = self._library

        def opened(device: int) -> int:
            return made(library.ibv_open_device(device), f"opening {name}")

        for _, context in self._list(opened, only=name):
            try:
                return NativeDevice(library, name, context)
            except BaseException:
                library.ibv_close_device(context)
                raise
        raise LookupError(f"no RDMA device {name}; there are {', '.join(self.device_names())}")

    def _list(self, use: Callable[[int], int], only: str = "") -> list[tuple[str, int]]:
        """(name, use(device)) for each device; the list lives only meanwhile."""
        library, count = self._library, ctypes.c_int()
        devices = library.ibv_get_device_list(ctypes.byref(count))
        if not devices:
            raise VerbsError(ctypes.get_errno(), "listing RDMA devices")
        try:
            found = [devices[i] for i in range(count.value)]
            names = [library.ibv_get_device_name(device).decode() for device in found]
            return [
                (name, use(device))
                for name, device in zip(names, found, strict=True)
                if only in {"", name}
            ]
        finally:
            library.ibv_free_device_list(devices)

    @override
    def status_text(self, status: int) -> str:
        text: bytes = self._library.ibv_wc_status_str(status)
        return text.decode()


class NativeDevice(Device):
    """An ibv_context and its ibv_pd."""

    def __init__(self, library: ctypes.CDLL, name: str, context: int) -> None:
        self.library = library
        self.name = name
        self.context: int | None = context
        # Soft-RoCE sends the packets within the call: milliseconds, and no other thread runs.
        self._in_software = not Path(f"/sys/class/infiniband/{name}/device").exists()
        self.protection = made(library.ibv_alloc_pd(context), f"a protection domain on {name}")

    @override
    def attributes(self) -> DeviceAttributes:
        found = abi.DeviceAttr()
        done(
            self.library.ibv_query_device(self.context, ctypes.byref(found)),
            f"asking {self.name} for its limits",
        )
        return DeviceAttributes(*(getattr(found, name) for name in DeviceAttributes._fields))

    @override
    def port(self, number: int) -> PortAttributes:
        found = abi.PortAttr()
        done(
            self.library.ibv_query_port(self.context, number, ctypes.byref(found)),
            f"asking {self.name} about its port {number}",
        )
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
        room = 1024
        table = (abi.GidTableEntry * room)()
        size = ctypes.sizeof(abi.GidTableEntry)
        count = self.library._ibv_query_gid_table(self.context, table, room, 0, size)  # noqa: SLF001 - its name
        if count < 0:
            raise VerbsError(-count, f"reading the GID table of {self.name}")
        return [
            GidEntry(row.gid_index, bytes(row.gid), abi.GID_KINDS[row.gid_type], _netdev(row))
            for row in table[:count]
            if row.port_num == port
        ]

    @override
    def register(self, address: int, length: int, access: Access) -> MemoryRegion:
        found = self.library.ibv_reg_mr_iova2(self.protection, address, length, address, access)
        return NativeMemoryRegion(
            self.library,
            made(found, f"registering {length} bytes at {address:#x} with {self.name}"),
        )

    @override
    def register_dmabuf(
        self, fd: int, offset: int, length: int, address: int, access: Access
    ) -> MemoryRegion:
        attempted = f"registering {length} bytes of DMA-BUF at {address:#x} with {self.name}"
        if not hasattr(self.library, "ibv_reg_dmabuf_mr"):
            raise VerbsError(errno.ENOSYS, f"{attempted} (rdma-core 34 or newer can)")
        found = self.library.ibv_reg_dmabuf_mr(self.protection, offset, length, address, fd, access)
        return NativeMemoryRegion(self.library, made(found, attempted))

    @override
    def channel(self) -> Channel:
        found = self.library.ibv_create_comp_channel(self.context)
        return NativeChannel(self.library, made(found, f"a completion channel on {self.name}"))

    @override
    def completion_queue(self, depth: int, channel: Channel) -> CompletionQueue:
        assert isinstance(channel, NativeChannel)
        found = self.library.ibv_create_cq(self.context, depth, None, channel.pointer, 0)
        attempted = f"a completion queue of {depth} on {self.name}"
        return NativeCompletionQueue(self.library, self.function, made(found, attempted))

    @override
    def queue_pair(
        self, send: CompletionQueue, receive: CompletionQueue, caps: QueueCaps
    ) -> QueuePair:
        assert isinstance(send, NativeCompletionQueue)
        assert isinstance(receive, NativeCompletionQueue)
        wanted = abi.QpInitAttr(
            send_cq=send.pointer, recv_cq=receive.pointer, cap=abi.Cap(*caps), qp_type=abi.TYPE_RC
        )
        found = self.library.ibv_create_qp(self.protection, ctypes.byref(wanted))
        pointer = made(found, f"a queue pair on {self.name} with {caps}")
        granted = QueueCaps(*(getattr(wanted.cap, name) for name in abi.CAPS))
        return NativeQueuePair(self.library, self.function, pointer, granted)

    def function(self, offset: int, *signature: object) -> Callable[..., int]:
        """A function of the data path, by its offset in the context."""
        assert self.context is not None
        address = ctypes.c_uint64.from_address(self.context + offset).value
        if self._in_software and offset == abi.CONTEXT_POST_SEND:
            return ctypes.CFUNCTYPE(*signature)(address)  # type: ignore[arg-type]  # ctypes types
        return ctypes.PYFUNCTYPE(*signature)(address)  # type: ignore[arg-type]  # ditto

    @override
    def close(self) -> None:
        if self.context is None:
            return
        context, self.context = self.context, None
        done(self.library.ibv_dealloc_pd(self.protection), f"closing {self.name}")
        done(self.library.ibv_close_device(context), f"closing {self.name}")


def _netdev(row: abi.GidTableEntry) -> str:
    try:
        return socket.if_indextoname(row.ndev_ifindex)
    except OSError:  # InfiniBand has none; a container may not see it
        return ""


class NativeMemoryRegion(MemoryRegion):
    """An ibv_mr."""

    def __init__(self, library: ctypes.CDLL, pointer: int) -> None:
        self._library = library
        self._pointer: int | None = pointer
        self.lkey = u32(pointer + abi.MR_LKEY)
        self.rkey = u32(pointer + abi.MR_RKEY)

    @override
    def close(self) -> None:
        pointer, self._pointer = self._pointer, None
        if pointer is not None:
            done(self._library.ibv_dereg_mr(pointer), "deregistering memory")
