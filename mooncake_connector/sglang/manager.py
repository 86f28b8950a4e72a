"""One scheduler rank's part of the backend: its node, and what SGLang's queues ask it for.

SGLang builds one for its prefill or decode queue. Its own messages over ZMQ are not used: a
prefill rank registers our control endpoint in their place, and peers talk to the node there.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from typing import TYPE_CHECKING, Any

import requests
import sglang
from mooncake_engine import TransferEngine
from mooncake_engine.testing.faults import Faults, install
from sglang.srt.disaggregation.common.conn import CommonKVManager, KVTransferError
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.runtime_context import get_parallel
from typing_extensions import override

from mooncake_connector.cluster import NodeRecord
from mooncake_connector.control import split_address
from mooncake_connector.device_order import call_behind
from mooncake_connector.errors import ConnectorError
from mooncake_connector.layout import page_bytes_at
from mooncake_connector.node import Node
from mooncake_connector.publish import Publication
from mooncake_connector.sglang import metrics, register, settings
from mooncake_connector.sglang.cache import describe, memory_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from sglang.srt.disaggregation.base.conn import KVArgs
    from sglang.srt.disaggregation.common.conn import PrefillServerInfo
    from sglang.srt.server_args import ServerArgs

    from mooncake_connector.decode import FetchRequest
    from mooncake_connector.peers import PeerRef
    from mooncake_connector.sglang.receiver import MooncakeKVReceiver

log = logging.getLogger(__name__)

_DRAIN_S = 10.0  # far below the 30 s after which SGLang gives pages away in any case
_LOOK_UP_S = 0.3  # how long the scheduler may wait for a prefill server's topology
_REGISTER_TRIES = 15


class MooncakeKVManager(CommonKVManager):
    """See `CommonKVManager`. Called by the scheduler's thread, if not said otherwise."""

    supports_deferred_decode_kv_release = True
    reports_transfer_latency = True

    def __init__(
        self,
        args: KVArgs,
        disaggregation_mode: DisaggregationMode,
        server_args: ServerArgs,
        is_mla_backend: bool | None = False,
    ) -> None:
        settings.refuse_unsupported(server_args)
        register.hand_over_prompts()
        self.config = settings.load()
        self.faults = Faults(slice_bytes=64 << 10) if self.config.testing else None
        self._role = disaggregation_mode
        self._fetching: dict[str, MooncakeKVReceiver] = {}
        # Reads of requests that SGLang has given up, by room: their pages are not free yet.
        self._draining: dict[int, set[str]] = {}
        self._lock = threading.Lock()  # guards _receivers and _draining: other threads come too
        self._receivers: set[MooncakeKVReceiver] = set()
        self._look_ups: dict[str, Future[bool]] = {}
        # Bootstrap servers that do not answer: (since when, last asked).
        self._silent: dict[str, tuple[float, float]] = {}
        # One on prefill: what waits for device events keeps its order.
        prefill = disaggregation_mode is DisaggregationMode.PREFILL
        self._threads = ThreadPoolExecutor(1 if prefill else 4, "mooncake-sglang")
        self._route: dict[str, Any] = {}
        self._opened = contextlib.ExitStack()
        with contextlib.ExitStack() as opening:
            opening.callback(self._threads.shutdown, wait=False, cancel_futures=True)
            spec, layout = describe(args, server_args, is_mla=bool(is_mla_backend))
            self._engine = opening.enter_context(TransferEngine(self.config.engine))
            if self.faults is not None:
                install(self._engine, self.faults)
            for address, nbytes, location in memory_of(args):
                page_bytes = page_bytes_at(layout, address, nbytes)
                self._engine.register_memory(
                    address, nbytes, location=location, page_bytes=page_bytes
                )
            self._layers = [set(group.layers) for group in spec.groups]
            self.node = Node(
                self.config,
                self._engine,
                engine_id=settings.engine_id(),
                spec=spec,
                layout=layout,
                rank=_flat_rank(args),
                on_counts=metrics.observer(server_args, args),
                on_peer_lost=self._on_peer_lost,
            )
            opening.callback(self.node.close)
            super().__init__(args, disaggregation_mode, server_args, is_mla_backend)
            self._close_zmq()
            if self._route and self.config.engine.metadata.backend == "etcd":
                opening.enter_context(Publication(self._engine.store, self.node, self._record()))
            self._opened = opening.pop_all()
        log.info(
            "%s rank %d of %s: %d buffers of KV, control endpoint %s",
            disaggregation_mode.value,
            self.node.rank,
            self.node.engine_id,
            len(args.kv_data_ptrs),
            self.node.address,
        )

    def close(self) -> None:
        """Withdraw, end all transfers, unregister. Idempotent."""
        self._opened.close()

    def failure(self, room: int, reason: str, *, recorded: bool) -> KVTransferError:
        """What a failed request of this room raises.

        `recorded`: without a reason of its own, the room's record of failures is meant for it.
        """
        if recorded:
            reason = reason or self.failure_records.get(room, "")
        return KVTransferError(
            room,
            reason or "Failed due to an unknown reason from another rank",
            is_from_another_rank=not reason,
        )

    # ---- prefill: registration

    @override
    def _register_topology_row(self, url: str, payload: dict[str, Any]) -> None:
        """Make this rank known to the bootstrap server at `url`, if not through etcd."""
        host, port = split_address(self.node.address)
        row = self._route = payload | {
            "rank_ip": host,
            "rank_port": port,
            "incarnation": self.node.incarnation,
            "engine_id": self.node.engine_id,
            "rank": self.node.rank,
        }
        if self.config.engine.metadata.backend == "etcd":
            return
        error = ""
        for number in range(_REGISTER_TRIES):
            if number:
                time.sleep(1.0)  # the server's own process may still be starting
            try:
                answer = requests.put(url, json=row, timeout=self.config.engine.connect_timeout_s)
            except requests.RequestException as exc:
                error = str(exc)
                continue
            if answer.status_code == requests.codes.ok:
                return
            error = answer.text
            if answer.status_code == requests.codes.bad_request:
                break
        raise ConnectorError(
            f"cannot register with this server's bootstrap server at {url} "
            f"(--disaggregation-bootstrap-port {self.bootstrap_port}): {error}"
        )

    def _record(self) -> NodeRecord:
        return NodeRecord(
            engine_id=self.node.engine_id,
            rank=self.node.rank,
            tp_size=_ranks(),
            role="kv_producer",
            control=self.node.address,
            incarnation=self.node.incarnation,
            framework="sglang",
            version=sglang.__version__,
            route=self._route,
        )

    # ---- prefill: transfers

    def note_readers(self, readers: int) -> None:
        """For SGLang's count of bytes: an MLA cache is copied to each reader whole."""
        if self.is_mla_backend:
            self._kv_replica_factor = readers

    def call_behind(
        self, events: list[Any], call: Callable[[], None], otherwise: Callable[[str], None]
    ) -> Future[None]:
        """`device_order.call_behind` on a thread of ours."""
        return call_behind(self._threads, events, call, otherwise)

    # ---- decode: who prefill is

    @override
    def try_ensure_parallel_info(self, bootstrap_addr: str) -> bool:
        """Is that prefill server's topology known? Asks it on a thread of its own.

        A server that cannot serve this one, or does not answer for `engine.connect_timeout_s`,
        fails the requests that wait for it; none of it ends the scheduler.
        """
        if bootstrap_addr in self.prefill_info_table:
            return True
        look_up = self._look_ups.get(bootstrap_addr)
        if look_up is None:
            ask = super().try_ensure_parallel_info
            look_up = self._threads.submit(ask, bootstrap_addr)
            self._look_ups[bootstrap_addr] = look_up
        try:
            found = look_up.result(_LOOK_UP_S)
        except NotYet:
            return False
        except Exception as exc:  # noqa: BLE001 - whatever it answered, this server goes on
            del self._look_ups[bootstrap_addr]
            self._fail_waiting(bootstrap_addr, f"cannot be used: {exc}")
            return False
        del self._look_ups[bootstrap_addr]
        if found:
            self._silent.pop(bootstrap_addr, None)
            return True
        now = time.monotonic()
        limit = self.config.engine.connect_timeout_s  # it may just be starting
        began, last = self._silent.get(bootstrap_addr, (now, now))
        if now - last > 3 * limit:  # nobody asked for a while: this begins anew
            began = now
        self._silent[bootstrap_addr] = began, now
        silent_s = now - began
        if silent_s >= limit:
            del self._silent[bootstrap_addr]
            self._fail_waiting(
                bootstrap_addr,
                f"has not answered for {silent_s:.0f} s: is it up, and is its "
                "--disaggregation-bootstrap-port the one that the router sends?",
            )
        return False

    @override
    def _resolve_rank_mapping(self, info: PrefillServerInfo) -> None:
        if info.attn_tp_size != self.attn_tp_size and not self.is_mla_backend:
            raise ConnectorError(
                f"its attention tensor-parallel size is {info.attn_tp_size}, ours is "
                f"{self.attn_tp_size}; only MLA models can do that, use one size"
            )
        if info.enable_kv_cache_sharding or info.enable_dsa_cache_layer_split:
            raise ConnectorError("it shards its KV cache over context-parallel ranks")
        super()._resolve_rank_mapping(info)

    def _fail_waiting(self, bootstrap_addr: str, reason: str) -> None:
        text = f"prefill's bootstrap server at {bootstrap_addr} {reason}"
        log.error("%s", text)
        with self._lock:
            waiting = [r for r in self._receivers if r.bootstrap_addr == bootstrap_addr]
        for receiver in waiting:
            receiver.fail_unless_reading(text)

    def _on_peer_lost(self, peer: PeerRef, reason: str) -> None:
        """On the node's thread: forget its server, so that the next request asks anew."""
        with self._lock:
            affected = [r for r in self._receivers if peer in r.peers]
        for receiver in affected:
            receiver.fail_unless_reading(f"prefill {reason}")
        with self.connection_lock:
            stale = {
                key
                for key, infos in self.connection_pool.items()
                if any(info.get("incarnation") == peer.incarnation for info in infos)
            }
            for key in stale:
                del self.connection_pool[key]
                for address in [a for a in self.prefill_info_table if key.startswith(f"{a}_")]:
                    del self.prefill_info_table[address]

    # ---- decode: reads

    def watch(self, receiver: MooncakeKVReceiver) -> None:
        """Tell this receiver when its prefill server is lost."""
        with self._lock:
            self._receivers.add(receiver)

    def forget(self, receiver: MooncakeKVReceiver) -> None:
        """The other way."""
        with self._lock:
            self._receivers.discard(receiver)

    def fetch(self, receiver: MooncakeKVReceiver, request: FetchRequest) -> None:
        """Begin a read; the receiver's `ended` is called once."""
        self._fetching[request.request_id] = receiver
        self.node.fetch(request)

    def give_up(self, room: int, request_ids: set[str]) -> None:
        """Cancel reads; `is_abort_release_safe` says when they no longer touch the pages."""
        with self._lock:
            if request_ids:
                self._draining.setdefault(room, set()).update(request_ids)
        for request_id in request_ids:
            self.node.cancel(request_id)

    def collect(self) -> None:
        """Hand out what ended since the last call."""
        results = self.node.take_results()
        for request_id in results.received:
            receiver = self._fetching.pop(request_id)
            room = receiver.bootstrap_room
            with self._lock:
                draining = self._draining.get(room, set())
                draining.discard(request_id)
                if not draining:
                    self._draining.pop(room, None)
            receiver.ended(request_id, results.failed.get(request_id))

    @override
    def is_abort_release_safe(self, bootstrap_room: int, required_acks: int) -> bool:
        """Does no own read touch the pages of a failed request any more?"""
        self.collect()
        return bootstrap_room not in self._draining

    def unread_layers(self, peers: list[PeerRef]) -> set[str]:
        """Layers that none of these pipeline stages holds."""
        specs = [self.node.spec_of(peer) for peer in peers]
        held = {layer for spec in specs if spec for group in spec.groups for layer in group.layers}
        return set().union(*self._layers) - held

    # ---- SGLang takes the memory away for a while

    def deregister_buffer_to_engine(self) -> None:
        """Before the KV pool's memory is released: nothing of ours touches it afterwards."""
        reason = "the server released its KV cache's memory"
        with self._lock:
            receivers = list(self._receivers)
        for receiver in receivers:  # also those that read nothing yet, or have just read all
            receiver.fail(reason)
        if self._role is DisaggregationMode.PREFILL:
            self.node.prefill.end_all(reason)
        elif not self.node.drain(_DRAIN_S):
            raise ConnectorError(f"a read into the KV cache did not end within {_DRAIN_S:g} s")
        for address, _, _ in memory_of(self.kv_args):
            self._engine.unregister_memory(address)

    def register_buffer_to_engine(self) -> None:
        """The memory is back, at the same addresses."""
        for address, nbytes, location in memory_of(self.kv_args):
            self._engine.register_memory(address, nbytes, location=location)

    def _close_zmq(self) -> None:
        """Nobody reads SGLang's own control socket here, so nobody shall be able to connect."""
        self.server_socket.close(linger=0)
        self._zmq_ctx.term()


def _flat_rank(args: KVArgs) -> int:
    """This rank's number among all of its server's ranks."""
    parallel = get_parallel()
    group = args.system_dp_rank or parallel.attn_dp_rank or 0
    stage = group * parallel.pp_size + args.pp_rank
    shard = stage * parallel.attn_cp_size + parallel.attn_cp_rank
    return int(shard * parallel.attn_tp_size + parallel.attn_tp_rank)


def _ranks() -> int:
    parallel = get_parallel()
    groups = max(parallel.dp_size, parallel.attn_dp_size)
    return int(groups * parallel.pp_size * parallel.attn_cp_size * parallel.attn_tp_size)
