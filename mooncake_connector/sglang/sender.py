"""Prefill's side of one request: which of its pages are final, and what became of them.

Bootstrapping until every decode rank has said what it wants; WaitingForInput until the last
`send`; Transferring until every decode rank has released; then Success, which gives SGLang its
pages back. Failed at any time. Statuses are set by what happens on the node's thread
(`_on_change`), never by polling, since with pipeline stages only stage 0 polls.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.common.conn import CommonKVSender
from typing_extensions import override

from mooncake_connector.session import HoldState
from mooncake_connector.sglang.cache import runs_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Future

    import numpy as np
    from numpy.typing import NDArray

    from mooncake_connector.holds import Hold
    from mooncake_connector.plan import PageRun
    from mooncake_connector.sglang.manager import MooncakeKVManager


class MooncakeKVSender(CommonKVSender):
    """See `CommonKVSender`; methods are called by the scheduler's thread."""

    kv_mgr: MooncakeKVManager

    def __init__(
        self,
        mgr: MooncakeKVManager,
        bootstrap_addr: str,
        bootstrap_room: int,
        req_has_disagg_prefill_dp_rank: bool = False,
    ) -> None:
        self._hold: Hold | None = None
        self._transfer_start_time: float | None = None
        self._early_send_wait_event: object = None  # set by the scheduler for the next chunk
        self._first = 0  # position of the first page that decode wants
        self._named: Future[None] | None = None
        self._reason = ""
        # Until it is over, the room's entries in the manager's tables are this sender's.
        self._owns_room = bootstrap_room not in mgr.request_status
        super().__init__(mgr, bootstrap_addr, bootstrap_room, req_has_disagg_prefill_dp_rank)
        if not self._owns_room:
            self._reason = f"bootstrap_room {bootstrap_room} is another request's, still running"
        elif not bootstrap_room:
            self._reason = "bootstrap_room 0 is refused by decode, which cannot tell it from none"
        if self._reason:
            self.conclude_state = KVPoll.Failed

    def open(self, prompt_key: str) -> None:
        """Offer the request to decode. `register.py` calls this as soon as it knows the prompt."""
        if self.kv_mgr.is_dummy_cp_rank or self.poll() == KVPoll.Failed:
            return
        self._hold = self.kv_mgr.node.prefill.open(
            str(self.bootstrap_room), "", prompt_key, reusable=True, on_change=self._on_change
        )
        assert self._hold is not None, "whoever had the room ended its transfer before it left"

    def _on_change(self, hold: Hold) -> None:
        """Under the prefill side's lock, on any thread; not after `_end` has returned."""
        manager, room = self.kv_mgr, self.bootstrap_room
        if hold.state is HoldState.COMPUTING:
            if hold.subscribed:
                self._first = hold.first[0]
                manager.req_to_decode_prefix_len[room] = self._first * manager.kv_args.page_size
                manager.note_readers(hold.expected)
                manager.update_status(room, KVPoll.WaitingForInput)
        elif hold.state is HoldState.HELD:
            manager.update_status(room, KVPoll.Transferring)
        elif hold.last and hold.delivered:
            manager.update_status(room, KVPoll.Success)
        else:
            self._reason = self._reason or hold.reason
            manager.update_status(room, KVPoll.Failed)

    @override
    def send(
        self,
        kv_indices: NDArray[np.int32],
        state_indices: Sequence[Any] | None = None,
        num_kv_tokens: int | None = None,
        indices_event: object = None,
    ) -> None:
        """Name the next pages of the request; the last call names state and metadata too."""
        if self.conclude_state in (KVPoll.Success, KVPoll.Failed):
            return
        kv_indices, positions, last, skip = self._prepare_send_indices(kv_indices, state_indices)
        if skip or self._hold is None:
            return
        if self._transfer_start_time is None:
            self._transfer_start_time = time.perf_counter()
        self._record_transfer_indices(kv_indices, state_indices)
        first = self._first + positions.start
        row = self.aux_index if last else None
        runs = runs_of(self.kv_mgr.kv_args, first, kv_indices, state_indices, row)
        # An event belongs to one chunk: the forward pass that writes it has been queued, not run.
        events = [e for e in (self._early_send_wait_event, indices_event) if e is not None]
        self._early_send_wait_event = None
        if events or (self._named is not None and not self._named.done()):
            self._named = self.kv_mgr.call_behind(
                events, lambda: self._name(runs, last=last), self._end
            )
        else:
            self._name(runs, last=last)

    def _name(self, runs: list[PageRun], *, last: bool) -> None:
        prefill, room = self.kv_mgr.node.prefill, str(self.bootstrap_room)
        prefill.pages_ready(room, runs, last=last, of=self._hold)
        if last:
            prefill.hold(room, "", of=self._hold)

    def _end(self, reason: str) -> None:
        """On return no verdict on these pages can be `held` any more."""
        room = str(self.bootstrap_room)
        self.kv_mgr.node.prefill.end(room, reason, retry=False, of=self._hold)

    @override
    def failure_exception(self) -> None:
        """Raise why it failed; SGLang may use the pages again when this returns."""
        failure = self.kv_mgr.failure(self.bootstrap_room, self._reason, recorded=self._owns_room)
        self.conclude_state = KVPoll.Failed
        self.clear()
        self.trace_ctx.trace_req_finish()
        raise failure

    @override
    def abort(self) -> None:
        """SGLang no longer wants it, and may use the pages again when this returns."""
        self._reason = self._reason or "Aborted by AbortReq."
        self.conclude_state = KVPoll.Failed
        self.clear()
        self.trace_ctx.abort(abort_info={"reason": "Aborted"})
        self.trace_ctx.trace_req_finish()

    @override
    def clear(self) -> None:
        """It is over. Idempotent; another request may use the room afterwards."""
        if not self._owns_room:
            return
        if self._hold is not None:
            self._end(self._reason or "the request is over on prefill")
        super().clear()
        self.kv_mgr.failure_records.pop(self.bootstrap_room, None)
        self._owns_room = False
