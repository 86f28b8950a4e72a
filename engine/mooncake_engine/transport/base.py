"""The contract between the engine and a transport, in prose and in two small classes.

A **transport** lives once per engine. It serves this engine's registered memory to peers
(`endpoint()` is what they need to know) and opens links to peers (`connect`).

A **link** reaches one peer. It says how many **lanes** it can use; a lane moves one slice at a
time for one thread at a time, a worker's (`mooncake_engine.worker`) or that of a caller who waits
anyway, which calls `move` and nothing else. So a transport with blocking calls (sockets,
process_vm_readv) writes no thread for the initiating side at all.

What every transport must keep, checked by `mooncake_engine.testing.conformance`:

* `move` returns only when every byte of the slice is in place (write: and acknowledged by the
  target), else raises `LaneError` with the status that the batch shall end with.
* After `move` returned or raised, and after `interrupt` made it raise, nothing of this lane
  touches the slice's local memory any more. This is what lets a caller free its pages.
* `interrupt` may come from any thread at any time, also when no `move` runs; it makes a blocked
  `move` raise within 100 ms. The lane is then spent: the worker closes it and opens another.
* A dead or restarted peer ends `move` with PEER_GONE; the target's refusal (outside its regions,
  grant ended) with REFUSED.
* When the way is gone and not the peer, `move` (or `open_lane`) raises `PathLost`, and the engine
  moves the slice again over another transport where it may. By then nothing of the slice is under
  way, neither here nor towards the peer. The lane is not spent: each further `move` raises
  `PathLost` at once while the way is gone, and moves bytes again when it is back.
* The target checks each run against its own registered regions and the grant against its
  `GrantTable`, where the target has a say (tcp); where the kernel or the NIC decides (shm, rdma)
  it is the initiator's check and theirs.
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, ClassVar

import msgspec
from typing_extensions import override

from mooncake_engine.types import Op

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from mooncake_engine.config import EngineConfig
    from mooncake_engine.grants import GrantTable
    from mooncake_engine.memory import RegionTable
    from mooncake_engine.types import Path, Region, SegmentRecord, Slice


class Capabilities(msgspec.Struct, frozen=True):
    """What a transport can do; the engine chooses by this and by locality."""

    ops: frozenset[Op] = frozenset({Op.READ, Op.WRITE})
    same_machine_only: bool = False
    #: Does `register` put other pages under a region? Then it comes before whoever pins them.
    exchanges_pages: bool = False
    device_memory: bool = False  # can it read and write memory of location "cuda:N"?


class Lane(abc.ABC):
    """Moves one slice at a time. One thread at a time calls `move`; any may `interrupt`."""

    #: How the slice last moved went, when not by its link's own path (`mooncake_engine.failover`).
    path: Path | None = None
    #: Set before `move` where the calling thread is a caller's, who does nothing but wait: then the
    #: interpreter lock may be held for a switch interval, if to give it up would cost as much.
    hurry: bool = False
    #: `time.monotonic()` when the last byte of the slice last moved was in place, where a thread
    #: without the interpreter lock looked at the clock; 0: when `move` returned.
    moved_at: float = 0.0

    @abc.abstractmethod
    def move(self, piece: Slice, deadline: float) -> None:
        """Move the slice; block until done.

        Args:
            piece: What to move.
            deadline: `time.monotonic()` second after which to give up with TIMED_OUT.

        Raises:
            LaneError: With the status that the batch shall end with.
            PathLost: This way is gone; another may lead to the peer.
        """

    @abc.abstractmethod
    def interrupt(self) -> None:
        """Make a blocked `move` raise soon, from any thread; idempotent."""

    @abc.abstractmethod
    def close(self) -> None:
        """Give back what the lane holds; never called while `move` runs; idempotent."""


class Link(abc.ABC):
    """One peer over one transport."""

    #: How many lanes the worker may open at once; one for transports that share no wire.
    lanes: int = 1
    #: Largest slice a lane should be handed, in bytes and in runs.
    slice_bytes: int = 8 << 20
    slice_runs: int = 1024
    #: Moves a small slice on the calling thread, in no more time than copying takes, whatever the
    #: peer does; on any number of threads at a time. False: nothing is known of the slice, and a
    #: lane will move it, or tell what is wrong. None: this needs a lane.
    at_once: Callable[[Slice], bool] | None = None
    #: Where large batches go, when that is not these lanes: the same peer by lanes of their own, so
    #: that small batches never wait for them. Closed by its own user, before this link.
    bulk: Link | None = None

    @abc.abstractmethod
    def open_lane(self) -> Lane:
        """Open one more lane; may block up to the connect time-out.

        Raises:
            LaneError: PEER_GONE when the peer cannot be reached.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Close what the link holds apart from its lanes; idempotent."""


class BulkLink(Link):
    """For large batches: one lane, whose threads share each slice, and so one batch at a time.

    Its slices are large, because beside a busy interpreter each of them waits for its lock once.
    """

    lanes = 1
    slice_bytes = 256 << 20
    slice_runs = 1 << 20

    def __init__(self, open_lane: Callable[[], Lane]) -> None:
        self._open_lane = open_lane

    @override
    def open_lane(self) -> Lane:
        return self._open_lane()

    @override
    def close(self) -> None:
        """Nothing but lanes to close."""


class Transport(abc.ABC):
    """One way to move bytes between engines. A new one is a new file and a registry line."""

    scheme: ClassVar[str]

    @property
    @abc.abstractmethod
    def capabilities(self) -> Capabilities:
        """What it can do: an attribute of the class, or a property where the machine decides."""

    def __init__(
        self, config: EngineConfig, regions: RegionTable, grants: GrantTable, incarnation: str
    ) -> None:
        """Start serving. Raises `PathUnavailable` when this machine cannot run the transport."""
        self.config = config
        self.regions = regions
        self.grants = grants
        self.incarnation = incarnation

    def register(self, region: Region) -> None:  # noqa: B027 - most transports need nothing
        """Make a region reachable. Blocks, where a device has to pin its pages.

        Called for each region, before peers hear of it; any thread, one call at a time.

        Raises:
            PathUnavailable: It cannot be; the region is then registered with no transport.
        """

    def unregister(self, region: Region) -> None:  # noqa: B027 - most transports need nothing
        """Make a region that was registered unreachable, so that its memory may be freed.

        Called when no batch of ours uses it and peers' slices that do were interrupted. When it
        returns, no device and no thread of this transport can touch that memory.

        Raises:
            PathUnavailable: A device may still reach it.
        """

    @abc.abstractmethod
    def endpoint(self) -> msgspec.Raw:
        """What peers need to reach us, as msgpack; goes into the segment record."""

    @abc.abstractmethod
    def connect(self, peer: SegmentRecord) -> Link:
        """Prove that the peer is reachable and return a link to it.

        Blocks up to `config.connect_timeout_s`.

        Raises:
            PathUnavailable: With the reason (not published, other machine, refused, dead).
        """

    def allocate(self, length: int) -> NDArray[np.uint8] | None:  # noqa: ARG002 - for those who can
        """`length` zero bytes that peers reach faster this way; None: any memory will do."""
        return None

    @abc.abstractmethod
    def close(self) -> None:
        """Stop serving; afterwards no thread of ours touches registered memory. Idempotent."""
