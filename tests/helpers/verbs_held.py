"""Queue pairs of a stub NIC whose requests end when the test says so, well or in error."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

from typing_extensions import override
from verbs_stub import Provider, StubCompletionQueue, StubQueuePair

if TYPE_CHECKING:
    import numpy as np
    from mooncake_engine.transport.rdma.verbs.base import Opcode, QueueCaps, Work
    from numpy.typing import NDArray

FLUSHED = 5  # IBV_WC_WR_FLUSH_ERR


class HeldQueuePair(StubQueuePair):
    """Requests are under way until the test ends them: in order, and in error all at once."""

    def __init__(
        self, provider: Provider, number: int, send: StubCompletionQueue, caps: QueueCaps
    ) -> None:
        super().__init__(provider, number, send, caps)
        self._sending = threading.Lock()  # guards all below
        self._under_way: deque[tuple[int, bool]] = deque()  # wr_id, and whether its end is told
        self._broken = False
        self.accepts = caps.max_send_wr  # of one chain; less than asked for: the queue is full
        self.ended_well: set[int] = set()  # wr_ids

    @property
    def under_way(self) -> list[int]:
        """The wr_ids that this may read or write memory for."""
        with self._sending:
            return [wr_id for wr_id, _ in self._under_way]

    def end(self, count: int) -> None:
        """The `count` oldest requests end well."""
        with self._sending:
            for _ in range(min(count, len(self._under_way))):
                wr_id, told = self._under_way.popleft()
                self.ended_well.add(wr_id)
                self.arrived(wr_id)
                if told:
                    self._send.complete(wr_id, self.number)

    def arrived(self, wr_id: int) -> None:
        """A request ends well; called before it says so."""

    def fail(self, status: int) -> None:
        """The oldest request ends in error, and all behind it as flushed."""
        with self._sending:
            if self._under_way:
                self._broken = True
                self._send.complete(self._under_way.popleft()[0], self.number, status)
                self._flush()

    def _flush(self) -> None:
        while self._under_way:
            self._send.complete(self._under_way.popleft()[0], self.number, FLUSHED)

    @override
    def to_error(self) -> None:
        super().to_error()
        with self._sending:
            self._broken = True
            self._flush()

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
        self.provider.called("post", rows=rows, wr_id=wr_id)
        count = rows.stop - rows.start
        accepted = min(count, self.accepts)
        with self._sending:
            assert not self._closed, "posted to a queue pair that was destroyed"
            full = len(self._under_way) + accepted > self.caps.max_send_wr
            assert not full, "more was posted than the queue has room for"
            for row in range(accepted):
                self._add(wr_id + row, told=(row + 1) % signal_every == 0 or row == count - 1)
        return accepted

    @override
    def post_imm(self, imm: int, data: bytes, remote: int, rkey: int, *, wr_id: int) -> None:
        self.provider.called("post_imm", imm=imm, data=data, remote=remote, rkey=rkey, wr_id=wr_id)
        with self._sending:
            self._add(wr_id, told=True)

    def _add(self, wr_id: int, *, told: bool) -> None:
        self._under_way.append((wr_id, told))
        if self._broken:
            self._flush()

    @override
    def close(self) -> None:
        with self._sending:
            self._under_way.clear()  # what had not ended never says so
        super().close()
