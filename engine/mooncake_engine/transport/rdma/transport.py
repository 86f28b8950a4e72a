"""RdmaTransport: opens this machine's NICs, registers memory with them, answers and opens links."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, ClassVar

import msgspec
from typing_extensions import override

from mooncake_engine import hosts, topology
from mooncake_engine.errors import PathUnavailable
from mooncake_engine.transport import sockets
from mooncake_engine.transport.base import Capabilities, Link, Transport
from mooncake_engine.transport.rdma import memlock, records
from mooncake_engine.transport.rdma.context import Context
from mooncake_engine.transport.rdma.gpu import Gpu, Way
from mooncake_engine.transport.rdma.link import RdmaLink
from mooncake_engine.transport.rdma.messages import Keys
from mooncake_engine.transport.rdma.records import RdmaEndpoint
from mooncake_engine.transport.rdma.registrations import Registrations
from mooncake_engine.transport.rdma.served import Server
from mooncake_engine.transport.rdma.shared import Shared
from mooncake_engine.transport.rdma.verbs import load
from mooncake_engine.transport.rdma.verbs.base import Verbs, VerbsError, VerbsMissing

if TYPE_CHECKING:
    from mooncake_engine.config import EngineConfig, RdmaConfig
    from mooncake_engine.grants import GrantTable
    from mooncake_engine.memory import RegionTable
    from mooncake_engine.topology import Machine
    from mooncake_engine.types import Region, SegmentRecord

_log = logging.getLogger(__name__)


class RdmaTransport(Transport):
    """RC queue pairs on every NIC that is there; see docs/rdma.md."""

    scheme: ClassVar[str] = "rdma"

    @override
    def __init__(
        self, config: EngineConfig, regions: RegionTable, grants: GrantTable, incarnation: str
    ) -> None:
        super().__init__(config, regions, grants, incarnation)
        rdma = config.rdma
        verbs = _verbs(rdma)
        self._gpu = gpu = Gpu(rdma)
        machine = topology.discover()
        if machine.gpus:  # CUDA may number them otherwise (CUDA_VISIBLE_DEVICES), or see none
            machine = topology.discover(cuda_order=gpu.pci_addresses())
        _check_locked_memory()
        with contextlib.ExitStack() as opening:
            contexts = _open(verbs, machine, rdma, opening)
            self.registrations = Registrations([c.device for c in contexts], rdma, gpu)
            opening.callback(self.registrations.close)
            self._matrix = _matrix(machine, rdma, [c.record.name for c in contexts])
            self.shared = Shared(
                config, contexts, self.registrations, gpu, self._matrix, _measured(rdma)
            )
            self._endpoint = self._serve(opening)
            self._opened = opening.pop_all()
        for context in contexts:
            _log.info(
                "rdma: %s, port %d, %s", context.record.name, context.record.port, context.why_gid
            )

    @property
    @override
    def capabilities(self) -> Capabilities:
        """Memory of GPUs too, where the machine has a way; asking that starts CUDA."""
        return Capabilities(device_memory=self._gpu.way is not Way.NONE)

    def _serve(self, opening: contextlib.ExitStack) -> RdmaEndpoint:
        config, rdma = self.config, self.config.rdma
        bind = rdma.bind_address or config.host or hosts.default_address()
        listener = sockets.listen(bind, rdma.min_port, rdma.max_port, "rdma")
        port: int = listener.getsockname()[1]
        contexts = {context.record.name: context for context in self.shared.contexts}
        server = Server(
            listener,
            contexts,
            self._keys,
            self._gpu.flush_writes,
            self.incarnation,
            config.connect_timeout_s,
        )
        opening.callback(server.close)
        return RdmaEndpoint(
            host=config.host or (hosts.default_address() if hosts.is_wildcard(bind) else bind),
            port=port,
            version=records.VERSION,
            devices=tuple(context.record for context in self.shared.contexts),
            matrix=self._matrix,
        )

    def _keys(self) -> Keys:
        snapshot = self.registrations.snapshot
        return Keys(snapshot.rkeys, tuple(snapshot.locations.tolist()))

    @override
    def endpoint(self) -> msgspec.Raw:
        return msgspec.Raw(msgspec.msgpack.encode(self._endpoint))

    @override
    def register(self, region: Region) -> None:
        self.registrations.add(region)

    @override
    def unregister(self, region: Region) -> None:
        self.registrations.remove(region.address)

    @override
    def connect(self, peer: SegmentRecord) -> Link:
        blob = peer.endpoints.get(self.scheme)
        if blob is None:
            raise PathUnavailable(f"{peer.name} published no rdma endpoint")
        try:
            endpoint = msgspec.msgpack.decode(blob, type=RdmaEndpoint)
        except msgspec.MsgspecError as bad:
            raise PathUnavailable(
                f"the rdma endpoint that {peer.name} published cannot be read ({bad}); run the "
                "same release on both"
            ) from bad
        if endpoint.version != records.VERSION:
            raise PathUnavailable(
                f"{peer.name} speaks version {endpoint.version} of the rdma protocol, we speak "
                f"{records.VERSION}; run the same release on both"
            )
        return RdmaLink(self.shared, peer.name, peer.incarnation, endpoint)

    @override
    def close(self) -> None:
        self._opened.close()


def _verbs(config: RdmaConfig) -> Verbs:
    try:
        return load(config.binding)
    except VerbsMissing as missing:
        raise PathUnavailable(str(missing)) from missing


def _check_locked_memory() -> None:
    refusal = memlock.read().refusal_at_start()
    if refusal:
        raise PathUnavailable(refusal)


def _open(
    verbs: Verbs, machine: Machine, config: RdmaConfig, opening: contextlib.ExitStack
) -> list[Context]:
    """Open every NIC that the settings let us use and that can be used.

    Raises:
        PathUnavailable: None, with what is wrong with each.
    """
    names = [
        name
        for name in verbs.device_names()
        if name not in config.devices_excluded and (not config.devices or name in config.devices)
    ]
    numa = {nic.name: nic.numa for nic in machine.nics}
    contexts: list[Context] = []
    refusals = []
    for name in names:
        try:
            context = Context(
                verbs,
                name,
                config,
                numa=numa.get(name, -1),
                cpus=topology.cpus_near(machine, name) if name in numa else None,
            )
        except (VerbsError, PathUnavailable) as error:
            refusals.append(f"{name}: {error}")
            continue
        if not context.record.can_read:
            refusals.append(f"{name}: it cannot READ")
            context.close()
            continue
        opening.callback(context.close)
        contexts.append(context)
    missing = [name for name in config.devices if name not in verbs.device_names()]
    refusals += [f"{name}: there is no such device" for name in missing]
    for refusal in refusals:
        _log.warning("rdma goes without %s", refusal)
    if not contexts:
        raise PathUnavailable(
            f"no RDMA device can be used: {'; '.join(refusals)}"
            if refusals
            else "this machine has no RDMA device (`ibv_devices` lists them); for Soft-RoCE: "
            "modprobe rdma_rxe && rdma link add rxe0 type rxe netdev eth0"
        )
    return contexts


def _matrix(machine: Machine, config: RdmaConfig, names: list[str]) -> topology.Matrix:
    if config.topology_file:
        return topology.narrow(topology.load_matrix(config.topology_file), names)
    return topology.narrow(topology.matrix(machine), names)


def _measured(config: RdmaConfig) -> topology.RailTable | None:
    return topology.load_rails(config.rail_topology_file) if config.rail_topology_file else None
