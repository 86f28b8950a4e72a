"""What SGLang's queues do with one request's sender or receiver, a turn per scheduler step.

`turn` is called in a loop and notes every status that it sees; what a scheduler does when a
request is over (`failure_exception`, `clear`) is left to the test.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.common.conn import CommonKVReceiver, KVTransferError

from mooncake_connector.sglang.receiver import MooncakeKVReceiver
from mooncake_connector.sglang.sender import MooncakeKVSender

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mooncake_connector.sglang.manager import MooncakeKVManager

NAMES = {number: name for name, number in vars(KVPoll).items() if isinstance(number, int)}
OVER = (KVPoll.Success, KVPoll.Failed)


class HostEvent:
    """A device event that fires when the test says so; SGLang gives CUDA's."""

    def __init__(self) -> None:
        self.fired = threading.Event()
        self.waited_for = threading.Event()
        self.error = ""  # what the device reports instead of having run

    def synchronize(self) -> None:
        self.waited_for.set()
        assert self.fired.wait(60), "the test forgot this event"
        if self.error:
            raise RuntimeError(self.error)


class _Request:
    """The common part: statuses, and how a scheduler ends a request."""

    peer: Any  # the sender or receiver

    def __init__(self) -> None:
        self.statuses: list[str] = []

    def note(self, status: int) -> None:
        if self.statuses[-1:] != [NAMES[status]]:
            self.statuses.append(NAMES[status])

    @property
    def over(self) -> bool:
        return self.statuses[-1:] in (["Success"], ["Failed"])

    def fail(self) -> dict[str, object]:
        """What a scheduler asks a failed request: its reason."""
        try:
            self.peer.failure_exception()
        except KVTransferError as exc:
            return {"reason": exc.failure_reason, "elsewhere": exc.is_from_another_rank}
        raise AssertionError("failure_exception raised nothing")


class Offer(_Request):
    """A request on prefill (`PrefillBootstrapQueue`, `send_kv_chunk`).

    Args:
        pages: All of the prompt's.
        chunks: How many pages each forward pass makes final; None: all at once. A test that
            calls `send` itself gives ().
    """

    def __init__(
        self,
        manager: MooncakeKVManager,
        address: str,
        room: int,
        *,
        key: str = "key",
        pages: Sequence[int],
        states: Sequence[Sequence[int]] = (),
        aux: int = 0,
        chunks: Sequence[int] | None = None,
        routed: bool = False,
    ) -> None:
        super().__init__()
        self._manager = manager
        self._pages = list(pages)
        self._states = [np.array(rows, np.int32) for rows in states]
        self._aux = aux
        self._chunks = chunks
        self._sent = 0
        self._total: int | None = None  # pages to send, once decode said what it has
        self.event: HostEvent | None = None
        self.peer = MooncakeKVSender(manager, address, room, routed)
        self.peer.open(key)
        self.note(self._poll())

    def turn(self) -> None:
        if self.over:
            return
        status = self._poll()
        self.note(status)
        if status == KVPoll.WaitingForInput and self._total is None:
            page_size = self._manager.kv_args.page_size
            self._pages = self._pages[self.peer.pop_decode_prefix_len() // page_size :]
            self._total = len(self._pages)
            self.peer.init(self._total, self._aux)
            for count in (self._total,) if self._chunks is None else self._chunks:
                self.send(count)

    def _poll(self) -> int:
        """With pipeline stages only the first one polls, for all of them."""
        if self._manager.pp_size == 1:
            status = self.peer.poll()
        elif self._manager.pp_rank == 0:
            status = self.peer.poll_pp_consensus()
        else:
            status = self._manager.request_status.get(self.peer.bootstrap_room, KVPoll.Failed)
        return int(status)

    def send(self, count: int, *, behind_event: bool = False) -> None:
        """These many more pages are computed, or will be when `event` fires."""
        assert self._total is not None, "not bootstrapped yet"
        chunk = np.array(self._pages[self._sent : self._sent + count], np.int32)
        self._sent += count
        if behind_event:
            self.event = self.peer._early_send_wait_event = HostEvent()
        self.peer.send(chunk, self._states if self._sent == self._total else None)


class Want(_Request):
    """A request on decode (`DecodePreallocQueue`, `DecodeTransferQueue`)."""

    def __init__(
        self, manager: MooncakeKVManager, address: str, room: int, *, key: str = "key"
    ) -> None:
        super().__init__()
        self._manager = manager
        self._address = address
        self._room = room
        self._bootstrapped = False
        self._allocated: dict[str, Any] | None = None
        self._dp_rank: int | None = None
        self.peer = MooncakeKVReceiver(manager, address, room)
        self.peer.expect(key)
        self.note(self.peer.poll())

    def allocate(
        self,
        pages: Sequence[int],
        aux: int,
        states: Sequence[Sequence[int]] = (),
        prefix: int = 0,
    ) -> None:
        """Its pages are here: read into them as soon as that is possible."""
        self._allocated = {
            "kv_indices": np.array(pages, np.int32),
            "aux_index": aux,
            "state_indices": [np.array(rows, np.int32) for rows in states] or None,
            "decode_prefix_len": prefix,
        }

    def turn(self) -> None:
        if self.over:
            return
        if not self._bootstrapped:
            self._bootstrap()
        status = self.peer.poll()
        self.note(status)
        if status == KVPoll.WaitingForInput and self._allocated is not None:
            allocated, self._allocated = self._allocated, None
            self.peer.send_metadata(**allocated)

    def _bootstrap(self) -> None:
        if not self._manager.try_ensure_parallel_info(self._address):
            return
        info = self._manager.prefill_info_table[self._address]
        if info.dp_size == 1:
            self._dp_rank = 0
        elif info.follow_bootstrap_room:
            self._dp_rank = self._room % info.dp_size
        else:
            found = CommonKVReceiver.query_prefill_dp_ranks(self._address, [self._room])
            self._dp_rank = found.get(str(self._room))
        if self._dp_rank is not None:
            self._bootstrapped = True
            self.peer.init(self._dp_rank)
