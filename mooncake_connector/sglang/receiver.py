"""Decode's side of one request: claims it, reads it from each prefill rank, says when it is here.

Bootstrapping until prefill's topology is known; WaitingForInput until the KV, then the state, then
the row of metadata have arrived and prefill has confirmed them; then Success. Failed at any time:
own reads may then still run, so SGLang keeps the pages until the manager's
`is_abort_release_safe`.
"""

from __future__ import annotations

import itertools
import threading
import time
from typing import TYPE_CHECKING, Any

from sglang.srt.disaggregation.base.conn import KVPoll, KVTransferDestination
from sglang.srt.disaggregation.common.conn import CommonKVReceiver
from typing_extensions import override

from mooncake_connector.control import join_address
from mooncake_connector.decode import FetchRequest
from mooncake_connector.peers import PeerRef
from mooncake_connector.sglang.cache import runs_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from mooncake_connector.sglang.manager import MooncakeKVManager

_serial = itertools.count()


class MooncakeKVReceiver(CommonKVReceiver):
    """See `CommonKVReceiver`. Called by the scheduler's thread, if not said otherwise.

    Attributes:
        peers: The prefill ranks that this rank reads from.
    """

    kv_mgr: MooncakeKVManager

    def __init__(
        self, mgr: MooncakeKVManager, bootstrap_addr: str, bootstrap_room: int | None = None
    ) -> None:
        self.peers: list[PeerRef] = []
        self._prompt_key = ""
        self._protocol = ""
        self._name = f"{bootstrap_room}/{next(_serial)}"
        self._reading: set[str] | None = None  # fetches that run; None before send_metadata
        self._reason = ""
        self._refusal = ""  # to be the reason as soon as prefill can be told
        self._reason_lock = threading.Lock()  # guards _reason and _reading's step from None
        self._began = time.monotonic()
        in_use = bootstrap_room in mgr.request_status
        super().__init__(mgr, bootstrap_addr, bootstrap_room)
        if in_use or not bootstrap_room:
            self._owns_bootstrap_room = False
            self.fail_unless_reading(
                f"bootstrap_room {bootstrap_room} is another request's, still running"
                if in_use
                else "bootstrap_room 0 cannot be told from a row of metadata not yet written"
            )
        mgr.watch(self)

    def expect(self, prompt_key: str, *, protocol: str = "") -> None:
        """What the KV must belong to. `register.py` calls this as soon as it knows the prompt."""
        self._prompt_key = prompt_key
        self._protocol = protocol

    def refuse(self, reason: str) -> None:
        """Fail with this reason once prefill's ranks are known, so that they do not wait for us."""
        self._refusal = reason

    @override
    def init(self, prefill_dp_rank: int) -> None:
        """Resolve prefill's ranks, connect to them and claim the request."""
        if self.poll() == KVPoll.Failed:
            return
        super().init(prefill_dp_rank)
        if self.conclude_state == KVPoll.Failed:
            return
        self.peers = [self._ref(info) for info in self.bootstrap_infos]
        if self._refusal:
            self.fail_unless_reading(self._refusal)
            return
        for peer in self.peers:
            self.kv_mgr.node.claim(str(self.bootstrap_room), peer)

    def _ref(self, info: dict[str, Any]) -> PeerRef:
        return PeerRef(
            address=join_address(info["rank_ip"], info["rank_port"]),
            incarnation=info["incarnation"],
            engine_id=info["engine_id"],
            rank=info["rank"],
            protocol=self._protocol,
        )

    @override
    def _register_kv_args(self) -> bool:
        """Nothing is registered with prefill: decode reads. Refuses a prefill of another kind."""
        strangers = [info for info in self.bootstrap_infos or () if "incarnation" not in info]
        if not strangers:
            return self.bootstrap_infos is not None
        self.conclude_state = KVPoll.Failed
        self.kv_mgr.record_failure(
            self.bootstrap_room,
            f"prefill at {self.bootstrap_addr} does not run with "
            "--disaggregation-transfer-backend mooncake_connector",
        )
        self.kv_mgr.update_status(self.bootstrap_room, KVPoll.Failed)
        return False

    @override
    def send_metadata(
        self,
        kv_indices: NDArray[np.int32],
        aux_index: int | None = None,
        state_indices: Sequence[Any] | None = None,
        decode_prefix_len: int | None = None,
        destination: KVTransferDestination = KVTransferDestination.DEVICE,
        device_kv_indices: NDArray[np.int32] | None = None,
    ) -> None:
        """The pages are allocated: read them as they become final on prefill."""
        if destination != KVTransferDestination.DEVICE or device_kv_indices is not None:
            raise NotImplementedError("only the KV pool on this rank's device can be read into")
        first, odd = divmod(decode_prefix_len or 0, self.kv_mgr.kv_args.page_size)
        if odd:
            self.fail_unless_reading(f"decode's prefix of {decode_prefix_len} tokens is no page's")
        requests = []
        for number, (peer, info) in enumerate(zip(self.peers, self.bootstrap_infos, strict=True)):
            real = not info["is_dummy"]  # else it holds a copy of what another one gives us
            last_stage = info["pp_rank"] == max(self.target_pp_ranks)
            wanted = runs_of(
                self.kv_mgr.kv_args,
                first,
                kv_indices if real else None,
                state_indices if real else None,
                aux_index if real and last_stage else None,
            )
            requests.append(
                FetchRequest(
                    request_id=f"{self._name}/{number}",
                    transfer_id=str(self.bootstrap_room),
                    peer=peer,
                    wanted=tuple(wanted),
                    tokens=(first + len(kv_indices)) * self.kv_mgr.kv_args.page_size,
                    prompt_key=self._prompt_key,
                    readers=self.required_dst_info_num,
                )
            )
        with self._reason_lock:
            if self._reason or self.conclude_state == KVPoll.Failed:
                return
            self._reading = {request.request_id for request in requests}
        for request in requests:
            self.kv_mgr.fetch(self, request)
        self.init_time = time.time()

    @override
    def _poll(self) -> KVPoll:
        if self.conclude_state is not None:
            return self.conclude_state
        self.kv_mgr.collect()
        self._fail_if_overdue()
        if self._reason:
            self._conclude(KVPoll.Failed)
        elif self._reading is not None and not self._reading:
            self._conclude(KVPoll.Success)
        else:
            return self.kv_mgr.check_status(self.bootstrap_room)
        return self.conclude_state

    def _conclude(self, state: KVPoll) -> None:
        self.conclude_state = state
        if self._owns_bootstrap_room:
            self.kv_mgr.update_status(self.bootstrap_room, state)

    def _fail_if_overdue(self) -> None:
        limit = self.kv_mgr.config.request_timeout_s  # a fetch watches its own
        if self._reading is None and time.monotonic() - self._began >= limit:
            what = "KV pages on this server" if self.peers else f"prefill at {self.bootstrap_addr}"
            self.fail_unless_reading(f"waited for {what} for {limit:g} s (request_timeout_s)")

    def ended(self, request_id: str, error: str | None) -> None:
        """One prefill rank's part is here, or is not; called once for each, by `collect`."""
        reading = self._reading
        assert reading is not None, "only fetches end"
        reading.discard(request_id)
        if error is not None:
            self.fail(error)
        elif not reading and len(self.peers) > 1:
            missing = self.kv_mgr.unread_layers(self.peers)
            if missing:
                self.fail(f"no prefill stage holds {', '.join(sorted(missing)[:3])}")

    def fail(self, reason: str) -> None:
        """Fail with this reason even if all has arrived. Any thread; reads are not stopped."""
        with self._reason_lock:
            self._reason = self._reason or reason

    def fail_unless_reading(self, reason: str) -> None:
        """Fail with this reason; a running read fails with its own. Any thread."""
        with self._reason_lock:
            if self._reading is None:
                self._reason = self._reason or reason

    @override
    def failure_exception(self) -> None:
        """Raise why it failed."""
        owns = self._owns_bootstrap_room
        failure = self.kv_mgr.failure(self.bootstrap_room, self._reason, recorded=owns)
        self.conclude_state = KVPoll.Failed
        self.clear()
        raise failure

    @override
    def abort(self) -> None:
        """SGLang no longer wants it."""
        self.fail("Aborted by AbortReq.")
        self._conclude(KVPoll.Failed)
        self.ensure_abort_notified()

    @override
    def _send_abort_notification(self, *, force_arm: bool = False) -> None:
        """Stop reading, or tell prefill that nobody will."""
        if self._reading is None:
            for number, peer in enumerate(self.peers):
                self.kv_mgr.node.decline(str(self.bootstrap_room), f"{self._name}/{number}", peer)
        else:
            self.kv_mgr.give_up(self.bootstrap_room, self._reading)

    @override
    def clear(self) -> None:
        """It is over. Idempotent; another request may use the room afterwards."""
        self.kv_mgr.forget(self)
        if not self._owns_bootstrap_room:
            return
        if self.conclude_state != KVPoll.Success:
            self.ensure_abort_notified()
        super().clear()
        self.kv_mgr.failure_records.pop(self.bootstrap_room, None)
        self._owns_bootstrap_room = False
