"""The engine's nouns: what a caller hands in, what goes over the wire, what comes back.

Three lifetimes, three types: a `Region` is memory this process holds, a `RegionRecord` is the
description of it that peers read, a `Slice` is what one lane moves at a time.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

import msgspec
import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Uint64s = NDArray[np.uint64]


_UINT64 = np.dtype(np.uint64)


class Op(enum.StrEnum):
    """Direction of a batch, seen from the initiator."""

    READ = "read"  # remote -> local
    WRITE = "write"  # local -> remote


class Status(enum.StrEnum):
    """How a batch ended. Anything but OK means that its destination bytes are undefined."""

    OK = "ok"
    CANCELLED = "cancelled"
    TIMED_OUT = "timed_out"
    PEER_GONE = "peer_gone"
    REFUSED = "refused"  # the target said no: outside its regions, or the grant has ended
    FAILED = "failed"


class Region(msgspec.Struct, frozen=True):
    """Memory registered in this process. Keeps `owner` alive while registered."""

    address: int
    length: int  # bytes, > 0
    location: str  # "cpu", "cuda:0", ...
    owner: object = None
    page_bytes: int = 0  # it is pages of so many bytes from its start on; 0: not known


class RegionRecord(msgspec.Struct, frozen=True, array_like=True):
    """What peers may know of a region."""

    address: int
    length: int
    location: str


class SegmentRecord(msgspec.Struct, frozen=True, kw_only=True):
    """All that a peer needs to reach one engine; published in the metadata store as msgpack.

    Attributes:
        name: Name of the segment, unique in the cluster. In p2p mode it is `host:port`.
        incarnation: Random per engine start; a new one means that every old address is void.
        machine_id: Equal for engines that share a kernel (boot id); locality hint, never proof.
        regions: Registered memory at the time of publishing.
        endpoints: Transport scheme -> that transport's own msgpack blob.
    """

    name: str
    incarnation: str
    machine_id: str
    regions: tuple[RegionRecord, ...] = ()
    endpoints: dict[str, msgspec.Raw] = {}


class Path(msgspec.Struct, frozen=True):
    """Which transport serves a segment and why; shown in logs, metrics and completions."""

    scheme: str
    reason: str


class Slice:
    """What one lane moves at a time: at most `slice_bytes` (8 MiB by default) and 1024 runs.

    `local[i]`, `remote[i]`, `lengths[i]` are one run of `lengths[i]` > 0 bytes.
    The arrays are contiguous uint64 and already merged and bounds-checked by the initiator.

    A prepared transfer moves the same slices again and again, also on two lanes at once: `packed`
    keeps what `mooncake_engine.native` made of one.
    """

    __slots__ = ("grant", "lengths", "local", "nbytes", "op", "packed", "remote")

    def __init__(
        self, op: Op, local: Uint64s, remote: Uint64s, lengths: Uint64s, nbytes: int, grant: bytes
    ) -> None:
        self.op = op
        self.local = local
        self.remote = remote
        self.lengths = lengths
        self.nbytes = nbytes
        self.grant = grant
        self.packed: bytes | None = None


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """The one end of a batch.

    Attributes:
        status: How it ended.
        error: Empty for OK; else what was attempted, with whom, and what to try.
        nbytes: Bytes asked for.
        path: Transport used and why: the segment's, or the one that took over when that was lost.
        descriptors: Runs as submitted.
        runs: Runs after merging neighbours on both sides.
        queued_s: From submit to the first slice taken by a lane.
        total_s: From submit until the last byte was in place. Who hears of it may have had to wait
            for the interpreter lock after that.
    """

    status: Status
    nbytes: int
    path: Path
    descriptors: int
    runs: int
    queued_s: float
    total_s: float
    error: str = ""

    @property
    def ok(self) -> bool:
        """True when every byte arrived."""
        return self.status is Status.OK


def uint64s(values: ArrayLike) -> Uint64s:
    """`values` (an iterable of ints or an array) as a contiguous one-dimensional uint64 array."""
    if (
        isinstance(values, np.ndarray)
        and values.dtype is _UINT64
        and values.ndim == 1
        and values.flags.c_contiguous
    ):
        return values  # as they usually come; what is asked below takes 3 us
    array = np.ascontiguousarray(values)
    if array.ndim != 1:
        raise ValueError(f"expected one dimension, got shape {array.shape}")
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"expected integers, got dtype {array.dtype}")
    if array.dtype.kind == "i" and array.size and int(array.min()) < 0:
        raise ValueError(f"expected addresses or lengths >= 0, got {int(array.min())}")
    return array.astype(np.uint64, copy=False)
