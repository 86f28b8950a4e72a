"""What the driver and a side tell each other: commands, answers, and their bytes. Pure.

Each command has one answer; `Failed` is the answer to any of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np

from mooncake_connector.bench.base import Transfer

if TYPE_CHECKING:
    from collections.abc import Iterable


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag=str.lower):
    """Base of all of them."""


class Packed(msgspec.Struct, frozen=True, array_like=True):
    """A `Transfer` in transit; the arrays are little-endian uint64."""

    op: str
    local: bytes
    remote: bytes
    lengths: bytes


class Open(Message, frozen=True, kw_only=True):
    """Allocate the buffer and start one side of a backend. Answer: `Opened`."""

    role: str  # "target" or "initiator"
    backend: str
    options: dict[str, str]
    environment: dict[str, str]  # set before the backend is imported
    nbytes: int


class Fill(Message, frozen=True, kw_only=True):
    """Fill the first `nbytes` of the buffer with the pattern of `seed`. Answer: `Done`."""

    seed: int
    nbytes: int


class Verify(Message, frozen=True, kw_only=True):
    """Check that runs hold the other side's bytes and that nothing else changed. Answer: `Done`.

    `local` are this side's offsets, `remote` those of the side that the bytes came from. Looks at
    the first `nbytes` of the buffer.
    """

    moved: tuple[Packed, ...]
    own_seed: int
    other_seed: int
    nbytes: int


class Connect(Message, frozen=True, kw_only=True):
    """Reach the target. Answer: `Done`."""

    address: dict[str, str]


class Prepare(Message, frozen=True, kw_only=True):
    """Make a thread for each entry, prepare its transfers there, warm up. Answer: `Done`."""

    work: tuple[tuple[Packed, ...], ...]
    warm_up_s: float


class Measure(Message, frozen=True, kw_only=True):
    """Run what was prepared for so long, or so many times on each thread. Answer: `Measured`."""

    seconds: float
    runs: int = 0  # on each thread; 0: as many as fit


class Contact(Message, frozen=True, kw_only=True):
    """Connect, prepare, move once, all for the first time. Answer: `Seconds`."""

    address: dict[str, str]
    transfer: Packed


class Busy(Message, frozen=True, kw_only=True):
    """A thread that runs pure Python all the time begins or ends. Answer: `Done`."""

    on: bool


class Clock(Message, frozen=True, kw_only=True):
    """CPU seconds of this process so far, the busy thread's left out. Answer: `Seconds`."""


class Opened(Message, frozen=True, kw_only=True):
    """The side runs. `address` is empty for an initiator."""

    pid: int
    address: dict[str, str]


class Done(Message, frozen=True, kw_only=True):
    """As asked."""


class Seconds(Message, frozen=True, kw_only=True):
    """One duration."""

    value: float


class Measured(Message, frozen=True, kw_only=True):
    """Seconds of each run, of all threads, as float64; from the first start to the last end.

    `in_place`: by the engine's own clock; empty where it has none.
    """

    samples: bytes
    in_place: bytes
    wall_s: float
    cpu_s: float
    nbytes: int  # moved in that time


class Failed(Message, frozen=True, kw_only=True):
    """The side could not; it lives on."""

    text: str


Command = Open | Fill | Verify | Connect | Prepare | Measure | Contact | Busy | Clock
Answer = Opened | Done | Seconds | Measured | Failed

encode = msgspec.msgpack.Encoder().encode
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_answer = msgspec.msgpack.Decoder(Answer).decode


def pack(transfer: Transfer) -> Packed:
    """For the way."""
    arrays = (transfer.local, transfer.remote, transfer.lengths)
    return Packed(transfer.op, *(np.asarray(array, "<u8").tobytes() for array in arrays))


def unpack(packed: Packed) -> Transfer:
    """The other way; the arrays are copies that may be written to."""
    arrays = (packed.local, packed.remote, packed.lengths)
    return Transfer(packed.op, *(np.frombuffer(array, "<u8").astype(np.uint64) for array in arrays))


def pack_work(work: Iterable[Iterable[Transfer]]) -> tuple[tuple[Packed, ...], ...]:
    """What each thread goes through."""
    return tuple(tuple(pack(transfer) for transfer in transfers) for transfers in work)
