"""What all links of one RDMA transport share: NICs, memory, endpoints, topology."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from mooncake_engine.topology import host_of
from mooncake_engine.topology.partners import Side, partners
from mooncake_engine.transport.rdma.endpoint_store import EndpointStore
from mooncake_engine.transport.rdma.rails import Rails

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mooncake_engine.config import EngineConfig
    from mooncake_engine.topology import Matrix, RailTable
    from mooncake_engine.transport.rdma.context import Context
    from mooncake_engine.transport.rdma.endpoint import Endpoint
    from mooncake_engine.transport.rdma.gpu import Gpu
    from mooncake_engine.transport.rdma.rails import Rail
    from mooncake_engine.transport.rdma.records import RdmaEndpoint
    from mooncake_engine.transport.rdma.registrations import Registrations

_log = logging.getLogger(__name__)


class Shared:
    """One transport's belongings, for its links. Safe to call from any thread."""

    def __init__(
        self,
        config: EngineConfig,
        contexts: Sequence[Context],
        registrations: Registrations,
        gpu: Gpu,
        matrix: Matrix,
        measured: RailTable | None,
    ) -> None:
        """Take them; closes none of them.

        Args:
            config: Settings.
            contexts: Our NICs.
            registrations: Our memory.
            gpu: Makes what NICs wrote visible.
            matrix: Which NICs are near to which memory.
            measured: Pairs of NICs that were measured, if any were.
        """
        self.config = config.rdma
        self.connect_timeout_s = config.connect_timeout_s
        self.contexts = tuple(contexts)
        self.registrations = registrations
        self.max_sge = min(context.caps.max_send_sge for context in contexts)
        self.max_read_sge = min(context.max_read_sge for context in contexts)
        self._gpu = gpu
        self._matrix = matrix
        self._measured = measured
        self._lock = threading.Lock()  # guards the stores
        # A NIC's cache of queue-pair state is what runs out: so many endpoints a NIC.
        self._stores: tuple[EndpointStore[tuple[str, int], Endpoint], ...] = tuple(
            EndpointStore(self.config.max_endpoints, self.config.endpoint_store) for _ in contexts
        )

    def text(self, status: int) -> str:
        """An ibv_wc_status in words."""
        return self.contexts[0].text(status)

    def settle(self, gpus: tuple[int, ...]) -> None:
        """What our NICs read into memory of these GPUs may be used after this. See `Gpu`."""
        for gpu in gpus:
            self._gpu.flush_writes(gpu)

    # Endpoints, by rail and peer.

    def find(self, rail: Rail, incarnation: str) -> Endpoint | None:
        """The endpoint of a rail to one start of a peer, if there is one."""
        with self._lock:
            return self._stores[rail.local].get((incarnation, rail.remote))

    def keep(self, endpoint: Endpoint, incarnation: str) -> list[Endpoint]:
        """Keep a new one; returns those that have to be closed for it."""
        rail = endpoint.rail
        with self._lock:
            store = self._stores[rail.local]
            evicted = store.add((incarnation, rail.remote), endpoint)
        if store.excess:
            _log.warning(
                "%d endpoints on %s, over the %d of max_endpoints: all of them are in use",
                *(len(store), self.contexts[rail.local].record.name, store.capacity),
            )
        return evicted

    def forget(self, endpoint: Endpoint, incarnation: str) -> None:
        """It failed or was closed. Idempotent."""
        rail = endpoint.rail
        with self._lock:
            self._stores[rail.local].remove((incarnation, rail.remote), endpoint)

    # Rails.

    def rails(self, name: str, peer: RdmaEndpoint) -> Rails:
        """All pairs of our NICs and a peer's, none of them known to be down."""
        config = self.config
        ours = Side({c.record.name: c.record.numa_node for c in self.contexts}, self._matrix)
        theirs = Side({device.name: device.numa_node for device in peer.devices}, peer.matrix)
        table = self._measured
        return Rails(
            list(ours.numas),
            list(theirs.numas),
            ours.rows,
            theirs.rows,
            pairs=partners(table, ours, theirs, host_of(name)) if table is not None else None,
            dest_affinity=config.dest_device_affinity,
            pause_s=config.rail_pause_s,
            error_threshold=config.rail_error_threshold,
            error_window_s=config.rail_error_window_s,
        )
