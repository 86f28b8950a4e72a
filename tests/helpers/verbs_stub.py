"""A stub provider: stands for NICs that this machine lacks, and records what it is asked for.

It is the binding's far side, so nothing of ours is replaced: the exact arguments of each verb are
in `calls`, verbs fail or wait when told to, and posted work completes at once without moving bytes.
What a real device does with the arguments is shown in the guest (`tests/rdma`).
"""

from __future__ import annotations

import itertools
import os
import threading
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from mooncake_engine.transport.rdma.verbs.base import (
    Access,
    Channel,
    CompletionQueue,
    Device,
    DeviceAttributes,
    GidEntry,
    MemoryRegion,
    Opcode,
    PortAttributes,
    QueueCaps,
    QueuePair,
    RemoteQueue,
    SendLimits,
    Verbs,
    VerbsError,
    Work,
)
from typing_extensions import override

if TYPE_CHECKING:
    from numpy.typing import NDArray

LIMITS = DeviceAttributes(
    max_qp=1024,
    max_qp_wr=4096,
    max_sge=30,
    max_sge_rd=30,
    max_cq=1024,
    max_cqe=65536,
    max_mr=1 << 20,
    max_mr_size=1 << 62,
    max_qp_rd_atom=16,
    max_qp_init_rd_atom=16,
    phys_port_cnt=2,
)
PORT = PortAttributes(
    state=4,
    active_mtu=4096,
    lid=0,
    link_layer="ethernet",
    gid_table_length=2,
    pkey_table_length=1,
    active_speed=32,
    active_width=2,
)


class Call(NamedTuple):
    """One verb with its arguments, by the names of the seam."""

    verb: str
    arguments: dict[str, Any]


class Provider:
    """What the devices of one stub have in common. Safe from any thread."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.open = 0  # objects not closed yet, but for devices
        self.most_at_once = 0  # registrations
        self.rkeys: set[int] = set()  # of what is registered
        self.numbers = itertools.count(1)
        self._changed = threading.Condition()  # guards all above and below
        self._failures: dict[str, list[int]] = {}
        self._holding = False
        self._inside = 0

    def of(self, verb: str) -> list[dict[str, Any]]:
        """The arguments of each call of a verb."""
        with self._changed:
            return [call.arguments for call in self.calls if call.verb == verb]

    def fail(self, verb: str, code: int, *, after: int = 0) -> None:
        """Let `after` calls of a verb pass and fail the next with an errno."""
        with self._changed:
            self._failures.setdefault(verb, []).extend([0] * after + [code])

    def hold(self) -> None:
        """Let registrations wait until `release`."""
        self._holding = True

    def release(self) -> None:
        with self._changed:
            self._holding = False
            self._changed.notify_all()

    def wait_inside(self, count: int, timeout: float = 10.0) -> None:
        """Block until `count` registrations wait. Raises `TimeoutError`."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._inside >= count, timeout):
                raise TimeoutError(f"{self._inside} registrations wait, not {count}")

    def called(self, verb: str, **arguments: Any) -> int:  # noqa: ANN401 - as the seam has them
        """Record a call; fails or waits as told. Returns a new number."""
        with self._changed:
            self.calls.append(Call(verb, arguments))
            waiting = self._failures.get(verb)
            code = waiting.pop(0) if waiting else 0
            if code:
                raise VerbsError(code, f"{verb} with {arguments.get('device', 'the stub')}")
            if verb.startswith("register"):
                self._inside += 1
                self.most_at_once = max(self.most_at_once, self._inside)
                self._changed.notify_all()
                released = self._changed.wait_for(lambda: not self._holding, 10)
                self._inside -= 1
                assert released, "nobody called release()"
            return next(self.numbers)

    def count(self, step: int) -> None:
        with self._changed:
            self.open += step


class _Thing:
    """Whatever is opened and closed."""

    def __init__(self, provider: Provider, kind: str) -> None:
        self.provider = provider
        self._kind = kind
        self._closed = False
        provider.count(1)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self.provider.count(-1)
            self.provider.called(f"close_{self._kind}")


class StubRegion(_Thing, MemoryRegion):
    def __init__(self, provider: Provider, number: int) -> None:
        super().__init__(provider, "region")
        self.lkey, self.rkey = number, 0x1000_0000 + number
        provider.rkeys.add(self.rkey)

    @override
    def close(self) -> None:
        self.provider.rkeys.discard(self.rkey)
        super().close()


class StubChannel(_Thing, Channel):
    def __init__(self, provider: Provider) -> None:
        super().__init__(provider, "channel")
        self._event = os.eventfd(0, os.EFD_NONBLOCK)

    @override
    def fileno(self) -> int:
        return self._event

    def ring(self) -> None:
        os.eventfd_write(self._event, 1)

    @override
    def drain(self) -> None:
        try:
            os.eventfd_read(self._event)
        except BlockingIOError:
            return

    @override
    def close(self) -> None:
        if not self._closed:
            os.close(self._event)
        super().close()


class StubCompletionQueue(_Thing, CompletionQueue):
    def __init__(self, provider: Provider, depth: int, channel: StubChannel) -> None:
        super().__init__(provider, "completion_queue")
        self.depth = depth
        self._channel = channel
        self._lock = threading.Lock()  # guards the two below
        self._armed = False
        self._waiting: list[tuple[int, int, int, int | None]] = []

    def complete(self, wr_id: int, qp_num: int, status: int = 0, imm: int | None = None) -> None:
        with self._lock:
            assert len(self._waiting) < self.depth, "the completion queue overflowed"
            self._waiting.append((wr_id, qp_num, status, imm))
            if self._armed:
                self._armed = False
                self._channel.ring()

    @override
    def arm(self) -> None:
        with self._lock:
            self._armed = True

    @override
    def poll(self, into: NDArray[np.void]) -> int:
        with self._lock:
            taken, self._waiting = self._waiting[: into.size], self._waiting[into.size :]
        into[: len(taken)] = np.zeros(len(taken), into.dtype)
        for row, (wr_id, qp_num, status, imm) in enumerate(taken):
            into[row]["wr_id"], into[row]["qp_num"], into[row]["status"] = wr_id, qp_num, status
            into[row]["imm"], into[row]["received"] = imm or 0, imm is not None
        return len(taken)


class StubQueuePair(_Thing, QueuePair):
    def __init__(
        self, provider: Provider, number: int, send: StubCompletionQueue, caps: QueueCaps
    ) -> None:
        super().__init__(provider, "queue_pair")
        self.number, self.caps, self._send = number, caps, send
        self.receives: StubCompletionQueue | None = None

    @override
    def to_init(self, port: int, pkey_index: int, access: Access) -> None:
        self.provider.called("to_init", port=port, pkey_index=pkey_index, access=access)

    @override
    def to_rtr(self, peer: RemoteQueue) -> None:
        self.provider.called("to_rtr", peer=peer)

    @override
    def to_rts(self, limits: SendLimits) -> None:
        self.provider.called("to_rts", limits=limits)

    @override
    def to_error(self) -> None:
        self.provider.called("to_error")

    @override
    def query(self) -> dict[str, int]:
        return {"qp_state": 3}

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
        count = rows.stop - rows.start
        self.provider.called(
            "post",
            opcode=opcode,
            work=work,
            rows=rows,
            lkeys=lkeys,
            rkeys=rkeys,
            wr_id=wr_id,
            signal_every=signal_every,
            inline=inline,
        )
        for row in range(count):
            if (row + 1) % signal_every == 0 or row == count - 1:
                self._send.complete(wr_id + row, self.number)
        return count

    @override
    def post_imm(self, imm: int, data: bytes, remote: int, rkey: int, *, wr_id: int) -> None:
        self.provider.called("post_imm", imm=imm, data=data, remote=remote, rkey=rkey, wr_id=wr_id)
        self._send.complete(wr_id, self.number)

    @override
    def post_receive(self, wr_id: int) -> None:
        self.provider.called("post_receive", wr_id=wr_id)


class StubDevice(Device):
    def __init__(
        self,
        provider: Provider,
        name: str = "stub0",
        *,
        limits: DeviceAttributes = LIMITS,
        port: PortAttributes = PORT,
        queue_pairs: type[StubQueuePair] = StubQueuePair,
    ) -> None:
        self.provider, self.name = provider, name
        self._limits, self._port, self._queue_pairs = limits, port, queue_pairs

    @override
    def attributes(self) -> DeviceAttributes:
        return self._limits

    @override
    def port(self, number: int) -> PortAttributes:
        self.provider.called("port", device=self.name, number=number)
        return self._port

    @override
    def gids(self, port: int) -> list[GidEntry]:
        raw = bytes(10) + b"\xff\xff" + bytes([10, 0, 0, port])
        return [GidEntry(1, raw, "roce_v2", "")]

    @override
    def register(self, address: int, length: int, access: Access) -> MemoryRegion:
        number = self.provider.called(
            "register", device=self.name, address=address, length=length, access=access
        )
        return StubRegion(self.provider, number)

    @override
    def register_dmabuf(
        self, fd: int, offset: int, length: int, address: int, access: Access
    ) -> MemoryRegion:
        number = self.provider.called(
            "register_dmabuf",
            device=self.name,
            fd=fd,
            offset=offset,
            length=length,
            address=address,
            access=access,
        )
        return StubRegion(self.provider, number)

    @override
    def channel(self) -> StubChannel:
        return StubChannel(self.provider)

    @override
    def completion_queue(self, depth: int, channel: Channel) -> StubCompletionQueue:
        assert isinstance(channel, StubChannel)
        self.provider.called("completion_queue", device=self.name, depth=depth)
        return StubCompletionQueue(self.provider, depth, channel)

    @override
    def queue_pair(
        self, send: CompletionQueue, receive: CompletionQueue, caps: QueueCaps
    ) -> StubQueuePair:
        assert isinstance(send, StubCompletionQueue)
        number = self.provider.called("queue_pair", device=self.name, caps=caps)
        made = self._queue_pairs(self.provider, number, send, caps)
        made.receives = receive if isinstance(receive, StubCompletionQueue) else None
        return made

    @override
    def close(self) -> None:
        self.provider.called("close_device", device=self.name)


class StubVerbs(Verbs):
    """Devices by name, all of one provider."""

    name: ClassVar[str] = "stub"

    def __init__(self, *devices: StubDevice) -> None:
        self._devices = {device.name: device for device in devices}

    @override
    def device_names(self) -> list[str]:
        return list(self._devices)

    @override
    def open(self, name: str) -> StubDevice:
        return self._devices[name]

    @override
    def status_text(self, status: int) -> str:
        return f"status {status}"
